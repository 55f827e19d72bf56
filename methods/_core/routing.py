"""Hard choices that train: gates with a straight-through gradient, and tokens that take or pass by a module."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gate(logits: Tensor, tau: float, random: torch.Generator | None = None) -> Tensor:
    """0 or 1 for each of `logits`, in float32 or better.

    With a generator the logits get the difference of two Gumbel draws, which is one logistic draw, and are divided by `tau`;
    the gradient is that of their sigmoid. Without one a gate is open where its logit is positive.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if random is None:
        return (logits > 0).to(logits)
    u = torch.rand(logits.shape, generator=random, device=random.device).to(logits)
    soft = ((logits + torch.logit(u, eps=1e-7)) / tau).sigmoid()
    return (soft > 0.5).to(soft) + (soft - soft.detach())


def through(module: Callable[[Tensor], Tensor], x: Tensor, keep: Tensor) -> Tensor:
    """`module(x)` for the tokens of x (B, N, D) where `keep` (B, N) is true, 0 for the others, which are not computed."""
    if keep.all():
        return module(x)
    out = torch.zeros_like(x)
    if keep.any():
        out[keep] = module(x[keep][None])[0]
    return out
