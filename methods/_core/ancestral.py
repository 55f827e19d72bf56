"""Sampling step by step from the posterior of a table of noise levels (DDPM, Ho et al. 2020), by some of them or all."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def posterior(x0: Tensor, x: Tensor, kept: float, before: float) -> Tensor:
    """The mean of what stands before x = sqrt(kept) x0 + sqrt(1 - kept) eps, where the share kept is `before`."""
    beta = 1 - kept / before
    return (before ** 0.5 * beta * x0 + (kept / before) ** 0.5 * (1 - before) * x) / (1 - kept)


def spaced(levels: int, steps: int) -> list[int]:
    """`steps` of 0..`levels` - 1, evenly from the first to the last, or the last alone.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    if not 1 <= steps <= levels:
        raise ValueError(f"steps={steps} must lie in 1..{levels}")
    return torch.linspace(levels - 1, 0, steps, dtype=torch.float64).round().long().flip(0).tolist()


@torch.no_grad()
def ancestral(says: Callable[[Tensor, int], tuple[Tensor, Tensor | None]], x: Tensor, kept: Sequence[float],
              times: Sequence[int], random: torch.Generator) -> Tensor:
    """From noise x (B, ...) at the last of `times` to a sample.

    Args:
        says: x and a time -> the x0 that is seen in it, and where in [-1, 1] the logarithm of the step's variance lies between
            its bounds, that of the posterior and that of the forward step; None: the lower one.
        kept: of each time the share that is kept, abar.
        times: rising.
    """
    for i in reversed(range(len(times))):
        now, before = kept[times[i]], kept[times[i - 1]] if i else 1.0
        x0, where = says(x, times[i])
        x = posterior(x0, x, now, before)
        if i:
            beta = 1 - now / before
            low, high = (x.new_tensor(each).log() for each in (beta * (1 - before) / (1 - now), beta))
            deviation = ((low if where is None else low + (where + 1) / 2 * (high - low)) / 2).exp()
            x = x + deviation * torch.randn(x.shape, generator=random, device=random.device).to(x)
    return x
