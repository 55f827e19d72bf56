"""How good images are: distance to the unaccelerated ones, and what a judge trained apart from the generators says.

There are three judges: of digits, of moving digits frame by frame, and of emoji, which is asked for the nearest real ones.
A Frechet distance falls with the number of images, so only those of equal `n` compare.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from accel_tools.zoo import digits
from methods._core.tune import psnr  # noqa: F401  (the one that recipes are searched by)
from methods._zoo import FOLDER, card, load_judge
from methods._zoo.emoji_judge import nearest_clusters
from methods._zoo.judge import frechet, moments


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of images (B, C, H, W) or clips (B, F, C, H, W) in [0, 1], each side at least 11.

    Wang et al. 2004: 11x11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03, where the window fits whole.
    """
    x = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-x.square() / (2 * 1.5 ** 2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blur(t: Tensor) -> Tensor:
        return F.conv2d(t.flatten(0, -3)[:, None], window)

    a, b = a.double().cpu(), b.double().cpu()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return float(score.mean())


@cache
def _judge(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A judge and what it keeps of the real images."""
    return load_judge(name), load_file(FOLDER / f"{name}_reference.safetensors")


def _features(judge: nn.Module, images: Tensor) -> Tensor:
    """(N, D) of images (N, C, 32, 32) in [0, 1]."""
    return torch.cat([judge.features(part * 2 - 1) for part in images.split(250)])


def distance(features: Tensor, mean: Tensor, cov: Tensor) -> float | None:
    """Frechet distance of features (N, D) to real ones; None for fewer than two."""
    found = frechet(*moments(features), mean, cov) if len(features) > 1 else math.nan
    return None if math.isnan(found) else found


def recall_of(right: Tensor, classes: Sequence[Any], of: Sequence[Any]) -> list[float | None]:
    """Share of `right` (N,) bool within each class of `of`; None where none of `classes` (N,) is that class."""
    shares = []
    for each in of:
        chosen = torch.tensor([found == each for found in classes])
        shares.append(float(right[chosen].float().mean()) if chosen.any() else None)
    return shares


@torch.no_grad()
def quality(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What the digit judge says of images (B, 1, 32, 32) in [0, 1] asked for as `labels` (B,).

    `recall` has one share for each digit, None where none was asked for; `frechet` is the distance to real digits.
    """
    judge, real = _judge("judge")
    features = _features(judge, images)
    right = judge.head(features).argmax(-1) == labels
    return {"n": len(images), "label_accuracy": float(right.float().mean()),
            "recall": recall_of(right, labels.tolist(), range(10)),
            "frechet": distance(features, real["mean"], real["cov"])}


@torch.no_grad()
def real_frechet(n: int) -> dict[str, Any]:
    """The distance of `n` held-out real digits to the others of them, which no generator needs to beat.

    Where the digits cannot be had, the figure on the judge's card, which is for the `n` given there.
    """
    judge, real = _judge("judge")
    try:
        images, _ = digits.split(held_out=True)
    except RuntimeError:
        return real_frechet_of_card("judge")
    others = images[1000:1000 + n]                                  # the first thousand made the reference
    return {"frechet": frechet(*moments(judge.features(others)), real["mean"], real["cov"]), "n": len(others)}


def real_frechet_of_card(name: str) -> dict[str, Any]:
    """The distance of real images to other real ones that stands on a judge's card."""
    metrics = card(name)["metrics"]
    return {"frechet": metrics["frechet_real_vs_real"], "n": metrics["frechet_n"]}


@torch.no_grad()
def clip_quality(clips: Tensor, labels: Tensor) -> dict[str, Any]:
    """What the judge of moving digits says of clips (B, F, C, 32, 32) in [0, 1] asked for as `labels` (B,).

    The digit of a clip is the one seen in most of its frames, the lower one if two are seen equally often.
    `frame_agreement` is the share of frames that show it; `travel` is the mean distance in pixels from the centre of the
    ink in the first frame to that in the last; `frechet` is the distance of the frames to real ones, of `frames` frames.
    """
    judge, real = _judge("video_judge")
    clips = clips.mean(2, keepdim=True)                             # gray, however many channels it came in
    count, frames = clips.shape[:2]
    features = _features(judge, clips.flatten(0, 1))
    seen = judge.head(features).argmax(-1).view(count, frames)
    votes = F.one_hot(seen, 10).sum(1)
    digit = votes.argmax(-1)
    right = digit == labels
    path = centroid(clips.squeeze(2))
    return {"n": count, "label_accuracy": float(right.float().mean()),
            "recall": recall_of(right, labels.tolist(), range(10)),
            "frame_agreement": float((seen == digit[:, None]).float().mean()),
            "travel": float((path[:, -1] - path[:, 0]).norm(dim=-1).mean()), "frames": count * frames,
            "frechet": distance(features, real["mean"], real["cov"])}


def centroid(images: Tensor) -> Tensor:
    """Centre of brightness (..., 2) of images (..., H, W) in [0, 1], row and column in pixels; the middle of an empty one."""
    height, width = images.shape[-2:]
    ink = images + 1e-6
    rows, columns = torch.arange(height).to(ink), torch.arange(width).to(ink)
    mass = ink.sum((-2, -1))
    return torch.stack([(ink.sum(-1) * rows).sum(-1) / mass, (ink.sum(-2) * columns).sum(-1) / mass], -1)


@torch.no_grad()
def emoji_quality(images: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """What the emoji judge says of images (B, 3, 32, 32) in [0, 1] asked for by `names`.

    `retrieval` is the share whose emoji is among the five real ones nearest in the judge's features, where near-duplicates
    count as one; `retrieval_top1` is the share for which it is the nearest. `recall` is `retrieval` within each group.
    """
    judge, real = _judge("emoji_judge")
    known, groups = card("emoji_judge")["names"], card("emoji_judge")["groups"]
    features, real_features = _features(judge, images), real["features"].float()
    near = nearest_clusters(features, real_features, real["cluster"], 5)
    wanted = [{int(real["cluster"][i]) for i, other in enumerate(known) if other == name} for name in names]
    first = torch.tensor([row[0] in asked for row, asked in zip(near.tolist(), wanted, strict=True)])
    found = torch.tensor([bool(asked & set(row)) for row, asked in zip(near.tolist(), wanted, strict=True)])
    group = dict(zip(known, groups, strict=True))
    return {"n": len(images), "retrieval": float(found.float().mean()), "retrieval_top1": float(first.float().mean()),
            "recall": recall_of(found, [group[name] for name in names], emoji_groups()),
            "frechet": distance(features, *moments(real_features))}


@torch.no_grad()
def nearest_emoji(images: Tensor, names: Sequence[str]) -> list[str]:
    """Of images (B, 3, 32, 32) in [0, 1], which of the emoji called `names` each is nearest to in the judge's features."""
    judge, real = _judge("emoji_judge")
    places = [card("emoji_judge")["names"].index(name) for name in names]
    return [names[best] for best in (_features(judge, images) @ real["features"].float()[places].T).argmax(1).tolist()]


def emoji_groups() -> list[str]:
    """The groups of emoji the judge knows, sorted."""
    return sorted(set(card("emoji_judge")["groups"]))


def real_emoji_frechet(n: int) -> dict[str, Any]:
    """The distance of `n` real emoji to the other half of them; no cluster has members in both halves."""
    _, real = _judge("emoji_judge")
    return halves_frechet(real["features"].float(), real["cluster"], n)


def halves_frechet(features: Tensor, cluster: Tensor, n: int) -> dict[str, Any]:
    """Distance of up to `n` features (N, D) of one half of the clusters to all of the other half."""
    order = torch.randperm(int(cluster.max()) + 1, generator=torch.Generator().manual_seed(0))
    first = torch.isin(cluster, order[: len(order) // 2])
    mine = features[first]
    mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(0))[:n]]
    return {"frechet": distance(mine, *moments(features[~first])), "n": len(mine)}
