"""The judges: small networks trained on real images alone, which score what the generators draw."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from accel_tools.zoo import digits, emoji
from accel_tools.zoo.training import CHECKPOINTS, ZOO, Run, Trained, batch, train
from methods._zoo.emoji_judge import EmojiJudge, nearest_clusters
from methods._zoo.judge import Judge, frechet, moments

ALIKE = 0.12                       # root-mean-square distance at 16x16, values in [-1, 1], below which two pictures are one


def jitter(x: Tensor, random: torch.Generator, amount: float = 1.0, empty: float = -1.0) -> Tensor:
    """A small random rotation, scale, shear and shift of each image; `empty` fills what comes in from outside."""
    angle, shear, grow, dx, dy = ((torch.rand(5, len(x), generator=random) * 2 - 1)
                                  * amount * torch.tensor([0.25, 0.2, 0.12, 0.12, 0.12])[:, None])
    row0 = torch.stack([(1 + grow) * angle.cos(), shear - angle.sin(), dx], -1)
    row1 = torch.stack([angle.sin(), (1 + grow) * angle.cos(), dy], -1)
    grid = F.affine_grid(torch.stack([row0, row1], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x - empty, grid, align_corners=False) + empty


# ---- digits, still and moving ------------------------------------------------------------------------------------------

def anywhere(x: Tensor, random: torch.Generator) -> Tensor:
    """Each digit at the size and at a place it has in a clip. -> (B, 1, 32, 32)"""
    return digits.placed(x, torch.randint(digits.CANVAS - digits.SIDE + 1, (len(x), 1, 2), generator=random))[:, 0]


def train_digit_judge(seed: int, scale: float) -> Trained:
    return train_classifier("judge", jitter, seed, scale, "random rotation, scale, shear, shift")


def train_video_judge(seed: int, scale: float) -> Trained:
    return train_classifier("video_judge", lambda x, random: anywhere(jitter(x, random, 0.6), random), seed, scale,
                            "shrunk to 16x16 and laid anywhere on a 32x32 frame; random rotation, scale, shear, shift")


def train_classifier(name: str, vary: Callable[[Tensor, torch.Generator], Tensor], seed: int, scale: float,
                     how: str) -> Trained:
    """A ten-way classifier of single frames, seen through `vary(images, random)`."""
    torch.manual_seed(seed)
    x, y = digits.split(held_out=False)

    def loss_of(run: Run) -> Tensor:
        run.model.train()
        images, labels = batch(run, x, y, 128)
        return F.cross_entropy(run.model(vary(images, run.random)), labels, label_smoothing=0.05)

    run = Run(Judge(), steps=round(1500 * scale), lr=2e-3, average=0.99, seed=seed)
    train(run, loss_of, CHECKPOINTS / f"{name}.ckpt")
    x, y = digits.split(held_out=True)
    if name == "video_judge":
        x = anywhere(x, torch.Generator().manual_seed(0))
    return Trained(run, {}, batch=128, metrics=classifier_metrics(name, run.averaged.eval(), x, y),
                   data=f"npm {digits.PACKAGE}: 8,000 training images, 2,000 held out; {how}")


@torch.no_grad()
def classifier_metrics(name: str, judge: Judge, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Accuracy on held-out frames; and the Frechet distance between disjoint real sets, the floor of every other one."""
    features = judge.features(x)
    accuracy = float((judge.head(features).argmax(-1) == y).float().mean())
    reference = moments(features[:1000])          # half A is the reference, half B stands for "as good as real"
    save_file({"mean": reference[0].contiguous(), "cov": reference[1].contiguous()}, ZOO / f"{name}_reference.safetensors")
    real = frechet(*moments(features[1000:1500]), *reference)
    return {"held_out_accuracy": round(accuracy, 4), "frechet_real_vs_real": round(real, 4), "frechet_n": 500}


# ---- emoji -------------------------------------------------------------------------------------------------------------

def clusters(pictures: Tensor, alike: float = ALIKE) -> Tensor:
    """One number for each group of near-duplicates: pictures joined by a chain of distances below `alike`. -> (N,)"""
    small = F.avg_pool2d(pictures, 2).flatten(1)
    near = torch.cdist(small, small) < alike * small.shape[1] ** 0.5
    near.fill_diagonal_(True)
    label = torch.arange(len(pictures))
    while True:
        least = torch.where(near, label, len(label)).min(1).values
        if torch.equal(least, label):
            return label.unique(return_inverse=True)[1]
        label = least


def seen_badly(x: Tensor, random: torch.Generator) -> Tensor:
    """Pictures moved a little, with other colours, brightness and contrast, sometimes blurred, and noisy."""
    x = jitter(x, random, 0.6, empty=1.0)
    gain = 1 + 0.2 * (torch.rand(len(x), 3, 1, 1, generator=random) * 2 - 1)
    shift = 0.15 * (torch.rand(len(x), 3, 1, 1, generator=random) * 2 - 1)
    blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(x), 1, 1, 1, generator=random).square()
    noise = 0.15 * torch.rand(len(x), 1, 1, 1, generator=random) * torch.randn(x.shape, generator=random)
    return (x + share * (blur - x)) * gain + shift + noise


def train_emoji_judge(seed: int, scale: float) -> Trained:
    """Tell every cluster of near-duplicates from all others, however badly it is seen."""
    torch.manual_seed(seed)
    data = emoji.load(emoji.GROUPS)
    cluster = clusters(data.images)

    def loss_of(run: Run) -> Tensor:
        run.model.train()
        images, labels = batch(run, data.images, cluster, 128)
        cosine = run.model(seen_badly(images, run.random))
        margin = 0.2 * F.one_hot(labels, cosine.shape[1])
        return F.cross_entropy((cosine - margin) * 20, labels)

    run = Run(EmojiJudge(int(cluster.max()) + 1), steps=round(1800 * scale), lr=2e-3, average=0.99, seed=seed)
    train(run, loss_of, CHECKPOINTS / "emoji_judge.ckpt")
    drawn = emoji.load()
    return Trained(run, {"classes": int(cluster.max()) + 1}, batch=128,
                   metrics=retrieval_metrics(run.averaged.eval(), drawn.images, clusters(drawn.images), seed + 1),
                   data=f"npm {emoji.PACKAGE}: {len(data.names)} pictures of six groups at 32x32, varied in place, colour "
                        "and sharpness; near-duplicates are one class. The metrics are of variations not trained on, retrieved "
                        f"among the {len(drawn.names)} pictures the generators learn",
                   more={"names": drawn.names, "groups": drawn.groups})


@torch.no_grad()
def retrieval_metrics(judge: EmojiJudge, images: Tensor, cluster: Tensor, seed: int) -> dict[str, Any]:
    """How often a picture seen badly finds itself again, and the Frechet distance between two halves of all pictures; the
    features of all of them go to methods/_zoo/emoji_judge_reference.safetensors."""
    features = judge.features(images)
    save_file({"features": features.half().contiguous(), "cluster": cluster}, ZOO / "emoji_judge_reference.safetensors")
    seen = judge.features(seen_badly(images, torch.Generator().manual_seed(seed)))
    best = nearest_clusters(seen, features, cluster, 5)
    half, other = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).chunk(2)
    return {"retrieval_top1": round(float((best[:, 0] == cluster).float().mean()), 4),
            "retrieval_top5": round(float((best == cluster[:, None]).any(1).float().mean()), 4),
            "frechet_real_vs_real": round(frechet(*moments(features[half]), *moments(features[other])), 4),
            "frechet_n": len(half)}
