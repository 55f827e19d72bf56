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
    """Noisy samples x (B, C, ...) of x0 as a model gets them, at timesteps t (B,) as it is told them, with the noise eps and
    what the model is to say."""

    x: Tensor
    t: Tensor
    x0: Tensor
    eps: Tensor
    target: Tensor


class _Table:
    """x = sqrt(kept_t) x0 + sqrt(1 - kept_t) eps at the T levels of a table (DDPM)."""

    def __init__(self, scheduler: Any):
        self.says = getattr(scheduler.config, "prediction_type", None)
        if self.says not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"{type(scheduler).__name__} predicts {self.says}, none of epsilon, v_prediction and sample")
        self.kept, self.betas = scheduler.alphas_cumprod.float(), scheduler.betas.double()

    def t(self, u: Tensor) -> Tensor:
        T = len(self.kept)
        return (u * T).long().clamp(max=T - 1)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept[t.cpu()]
        return kept.sqrt(), (1 - kept).sqrt()

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[self.says]

    def denoised(self, said: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return {"epsilon": (x - s * said) / a, "v_prediction": a * x - s * said, "sample": said}[self.says]


class _Preconditioned:
    """x = c_in (x0 + sigma eps) with log sigma normal, t = log(sigma) / 4; the network says what is missing of x0 beside
    c_skip (x0 + sigma eps), in units of c_out, which gives its error the weight of 1 at each level (EDM, table 1)."""

    mean, spread = -1.2, 1.2                                                     # of log sigma

    def __init__(self, scheduler: Any):
        self.data = scheduler.config.sigma_data
        self.sign = {"epsilon": 1, "v_prediction": -1}[scheduler.config.prediction_type]

    def t(self, u: Tensor) -> Tensor:
        return (self.mean + self.spread * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6).double())).float() / 4

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (4 * t.double()).exp()
        c_in = (sigma ** 2 + self.data ** 2).rsqrt()
        return c_in, c_in * sigma

    def _parts(self, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:             # c_skip / c_in and c_out
        return self.data ** 2 * a, self.sign * s * self.data

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        skip, out = self._parts(a, s)
        return (x0 - skip * (a * x0 + s * eps)) / out

    def denoised(self, said: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        skip, out = self._parts(a, s)
        return skip * x + out * said


class _Flow:
    """x = (1 - sigma) x0 + sigma eps, t = T sigma; the model says eps - x0, the velocity (flow matching). sigma is uniform but
    for the scheduler's shift, which it may take from the size of an image instead: then there is none here."""

    def __init__(self, scheduler: Any):
        config = scheduler.config
        if getattr(config, "invert_sigmas", False):
            raise ValueError(f"{type(scheduler).__name__} with invert_sigmas counts its noise levels the other way round")
        self.T, self.shift = config.num_train_timesteps, 1.0 if getattr(config, "use_dynamic_shifting", False) else config.shift

    def t(self, u: Tensor) -> Tensor:
        return self.T * self.shift * u / (1 + (self.shift - 1) * u)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double() / self.T
        return 1 - sigma, sigma

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return eps - x0

    def denoised(self, said: Tensor, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return x - s * said


class Noising:
    """The forward process of a scheduler, a_t x0 + s_t eps.

    Args:
        scheduler: one of diffusers with `alphas_cumprod` and a `prediction_type` of "epsilon", "v_prediction" or "sample", with
            the preconditioning of EDM, or of flow matching.

    Raises:
        ValueError: another kind of scheduler or prediction.
    """

    def __init__(self, scheduler: Any):
        kinds = {"precondition_outputs": _Preconditioned, "scale_noise": _Flow, "alphas_cumprod": _Table}
        kind = next((kind for mark, kind in kinds.items() if hasattr(scheduler, mark)), None)
        if kind is None:
            raise ValueError(f"{type(scheduler).__name__} has no noise levels that are known here: a table of alphas_cumprod, "
                             "the preconditioning of EDM, or those of flow matching")
        self.process = kind(scheduler)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t for timesteps (B,), shaped to multiply `like` (B, ...)."""
        return tuple(level.view(-1, *[1] * (like.ndim - 1)).to(like) for level in self.process.levels(t))

    def sample(self, x0: Tensor, random: torch.Generator, t: Tensor | None = None) -> Noisy:
        """`x0` (B, C, ...) with noise of levels spread over all of the scheduler's, or of those of timesteps t (B,). Draws on
        the generator's device."""
        if t is None:
            t = self.process.t(stratified(len(x0), random))
        eps = torch.randn(x0.shape, generator=random, device=random.device).to(x0)
        a, s = self.levels(t, x0)
        return Noisy(a * x0 + s * eps, t.to(x0.device), x0, eps, self.process.target(x0, eps, a, s))

    def denoised(self, output: Tensor, noisy: Noisy) -> Tensor:
        """The x0 (B, C, ...) that an `output` of the model stands for."""
        return self.process.denoised(output, noisy.x, *self.levels(noisy.t, noisy.x))

    def snr(self, t: Tensor) -> Tensor:
        """(a_t / s_t)^2, the signal-to-noise ratio at timesteps (B,)."""
        a, s = self.process.levels(t)
        return (a / s) ** 2

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
        says = self.process.says if isinstance(self.process, _Table) else "those without a variance"
        if output.shape[1] != 2 * C or says != "epsilon":
            raise ValueError(f"an output of {output.shape[1]} channels does not fit {C} of {says}")
        said, variance = output.split(C, dim=1)
        return F.mse_loss(said, target) + self.variance_bound(said.detach(), variance, noisy).mean()

    def variance_bound(self, eps: Tensor, variance: Tensor, noisy: Noisy) -> Tensor:
        """Bits per dimension (B,) of a learnt variance (Improved DDPM, section 3.1): the divergence of the model's step from
        the true one, and at t = 0 the likelihood of x0 in 8 bits. `variance` says in [-1, 1] where between the two bounds
        log of the step's variance lies."""
        beta = self.process.betas
        kept = (1 - beta).cumprod(0)
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
