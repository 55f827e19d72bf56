"""How good images are: distance to the unaccelerated ones, and what a judge trained apart from the generator says."""
from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from accel_tools import digits
from methods._zoo import FOLDER, card, load_judge
from methods._zoo.judge import Judge, frechet, moments


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over the batch of the peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1]; inf where all are equal."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of images (B, C, H, W) in [0, 1], each side at least 11.

    Wang et al. 2004: 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03, where the window fits whole.
    """
    x = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-x.square() / (2 * 1.5 ** 2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blur(t: Tensor) -> Tensor:
        return F.conv2d(t.flatten(0, 1)[:, None], window)

    a, b = a.double().cpu(), b.double().cpu()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return float(score.mean())


@cache
def _judge() -> tuple[Judge, Tensor, Tensor]:
    reference = load_file(FOLDER / "judge_reference.safetensors")
    return load_judge(), reference["mean"], reference["cov"]


@torch.no_grad()
def quality(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What the digit judge says of images (B, 1, 32, 32) in [0, 1] asked for as `labels` (B,).

    `recall` has one share for each digit, None where none was asked for. `frechet` is the distance to real digits in the
    judge's features; it falls with the number of images, so compare equal `n` only. None for fewer than two images.
    """
    judge, mean, cov = _judge()
    features = torch.cat([judge.features(part * 2 - 1) for part in images.split(250)])
    right = judge.head(features).argmax(-1) == labels
    recall = [float(right[labels == c].float().mean()) if (labels == c).any() else None for c in range(10)]
    distance = frechet(*moments(features), mean, cov) if len(images) > 1 else math.nan
    return {"n": len(images), "label_accuracy": float(right.float().mean()), "recall": recall,
            "frechet": None if math.isnan(distance) else distance}


@torch.no_grad()
def real_frechet(n: int) -> dict[str, Any]:
    """The distance of `n` held-out real digits to the others of them, which no generator needs to beat.

    Where the digits cannot be had, the figure on the judge's card, which is for the `n` given there.
    """
    judge, mean, cov = _judge()
    try:
        images, _ = digits.split(held_out=True)
    except RuntimeError:
        metrics = card("judge")["metrics"]
        return {"frechet": metrics["frechet_real_vs_real"], "n": metrics["frechet_n"]}
    others = images[1000:1000 + n]                                  # the first thousand made the reference
    return {"frechet": frechet(*moments(judge.features(others)), mean, cov), "n": len(others)}
