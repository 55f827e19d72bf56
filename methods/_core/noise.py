"""Noise for training: samples at random levels of a scheduler, what a model is to say of them, and the loss."""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def stratified(size: int, random: torch.Generator) -> Tensor:
    """(size,) numbers in [0, 1), one in each of `size` equal parts, so that every batch covers all noise levels."""
    return (torch.randperm(size, generator=random) + torch.rand(size, generator=random)) / size


class Noisy(NamedTuple):
    """Noisy samples x (B, C, ...) of x0 at timesteps t (B,), with the noise eps and what a model is to say of them."""

    x: Tensor
    t: Tensor
    x0: Tensor
    eps: Tensor
    target: Tensor


class Noising:
    """The forward process of a scheduler, a_t x0 + s_t eps.

    Args:
        scheduler: one of diffusers, with `alphas_cumprod` and a `prediction_type` of "epsilon", "v_prediction" or "sample".

    Raises:
        ValueError: another kind of scheduler or prediction.
    """

    def __init__(self, scheduler: Any):
        self.says = getattr(scheduler.config, "prediction_type", None)
        if not hasattr(scheduler, "alphas_cumprod") or self.says not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"{type(scheduler).__name__} has no table of noise levels for epsilon, v_prediction or sample")
        self.alphas, self.betas = scheduler.alphas_cumprod.float(), scheduler.betas.double()

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t for timesteps (B,), shaped to multiply `like` (B, ...)."""
        kept = self.alphas[t.cpu()].view(-1, *[1] * (like.ndim - 1))
        return kept.sqrt().to(like), (1 - kept).sqrt().to(like)

    def sample(self, x0: Tensor, random: torch.Generator) -> Noisy:
        """`x0` (B, C, ...) with noise of levels spread over all of the scheduler's. Draws on the generator's device."""
        T = len(self.alphas)
        t = (stratified(len(x0), random) * T).long().clamp(max=T - 1)
        eps = torch.randn(x0.shape, generator=random, device=random.device).to(x0)
        a, s = self.levels(t, x0)
        target = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[self.says]
        return Noisy(a * x0 + s * eps, t.to(x0.device), x0, eps, target)

    def loss(self, output: Tensor, noisy: Noisy) -> Tensor:
        """Mean squared error of `output` (B, C, ...) against the target; with 2C channels plus the bound of the variance.

        Raises:
            ValueError: the output has neither C nor 2C channels, or a variance beside a prediction other than epsilon.
        """
        C = noisy.target.shape[1]
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        target = noisy.target.to(output)
        if output.shape[1] == C:
            return F.mse_loss(output, target)
        if output.shape[1] != 2 * C or self.says != "epsilon":
            raise ValueError(f"an output of {output.shape[1]} channels does not fit {C} of {self.says}")
        said, variance = output.split(C, dim=1)
        return F.mse_loss(said, target) + self.variance_bound(said.detach(), variance, noisy).mean()

    def variance_bound(self, eps: Tensor, variance: Tensor, noisy: Noisy) -> Tensor:
        """Bits per dimension (B,) of a learnt variance (Improved DDPM, section 3.1): the divergence of the model's step from
        the true one, and at t = 0 the likelihood of x0 in 8 bits. `variance` says in [-1, 1] where between the two bounds
        log of the step's variance lies."""
        beta, kept = self.betas, (1 - self.betas).cumprod(0)
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        true = beta * (1 - before) / (1 - kept)
        true[0] = true[1]                                                        # is 0, which has no logarithm

        def at(table: Tensor) -> Tensor:
            return table[noisy.t.cpu()].view(-1, *[1] * (eps.ndim - 1)).to(eps)

        a, s = self.levels(noisy.t, eps)
        error = at(before.sqrt() * beta / (1 - kept)) * (noisy.x0 - (noisy.x - s * eps) / a)     # of the step's mean
        low, high = at(true.log()), at(beta.log())
        log_variance = low + (variance + 1) / 2 * (high - low)
        divergence = (log_variance - low - 1 + (low - log_variance).exp() + error.square() * (-log_variance).exp()) / 2

        def below(edge: Tensor) -> Tensor:                                       # a tanh in place of the error function
            z = edge * (-log_variance / 2).exp()
            return (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)).tanh()) / 2

        upper = torch.where(noisy.x0 > 0.999, 1, below(error + 1 / 255))
        lower = torch.where(noisy.x0 < -0.999, 0, below(error - 1 / 255))
        nats = torch.where(at(torch.arange(len(beta))) == 0, -(upper - lower).clamp(min=1e-12).log(), divergence)
        return nats.flatten(1).mean(1) / math.log(2)
