"""What a generator of digits trained from scratch is worth: its loss on digits held out, and what the judge says of its own."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accel_tools.measure.macs import count_macs
from accel_tools.measure.quality import quality
from accel_tools.measure.trained import SEEDS, averaged

SAMPLES = 100                                    # for each seed


def linear(known: Tensor, labels: Tensor, asked: Tensor, right: Tensor) -> float:
    """The share of features `asked` (m, D) that a linear classifier gets `right` (m,), found by ridge regression on those
    `known` (n, D) and their digits `labels` (n,)."""
    mean, deviation = known.double().mean(0), known.double().std(0).clamp(min=1e-6)
    known, asked = (F.pad((part.double() - mean) / deviation, (0, 1), value=1.0) for part in (known, asked))
    weights = torch.linalg.solve(known.T @ known + 10 * torch.eye(known.shape[1]), known.T @ F.one_hot(labels, 10).double())
    return float(((asked @ weights).argmax(1) == right).double().mean())


@torch.no_grad()
def judged(draw: Callable[[Tensor, torch.Generator], Tensor]) -> dict[str, Any]:
    """What the judge says of images that `draw` makes of labels (B,) and a generator, (B, 1, 32, 32) in [-1, 1]: means and
    ranges over SEEDS, and what an image costs."""
    asked = torch.arange(SAMPLES) % 10
    rows = [quality(((draw(asked, torch.Generator().manual_seed(seed)) + 1) / 2).clamp(0, 1), asked) for seed in SEEDS]
    found: dict[str, Any] = {"n": SAMPLES * len(SEEDS), "seeds": list(SEEDS),
                             "macs_per_image": count_macs(lambda: draw(asked[:1], torch.Generator().manual_seed(0)))}
    for key in ("label_accuracy", "frechet"):
        found |= averaged(key, [row[key] for row in rows])
    return found


@torch.no_grad()
def worth(draw: Callable[[Tensor, torch.Generator], Tensor], error: Callable[[Tensor, Tensor, torch.Generator], Tensor],
          images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Means and ranges over SEEDS.

    Args:
        draw: labels (B,), random -> images (B, 1, 32, 32) in [-1, 1].
        error: images, labels, random -> the loss that sampling depends on.
        images, labels: held out; the first thousand made the judge's reference, the others are used here.
    """
    errors = [float(torch.stack([error(part, names, random) for part, names in zip(
        images[1000:].split(250), labels[1000:].split(250), strict=True)]).mean())
        for random in (torch.Generator().manual_seed(seed) for seed in SEEDS)]
    return averaged("held_out_loss", errors) | judged(draw)
