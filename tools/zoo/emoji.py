"""Emoji and their names: 64x64 pictures of the npm package `emoji-datasource-google`, halved to 32x32 in [-1, 1] on white.

Fetched on demand with the npm client (nothing is committed) and kept in `build/data/`. Of its nine groups six are used:
people differ only in skin, hair and gender, flags and symbols are mostly lettering that 32 pixels cannot hold. The judge
learns all six; the generators draw three of them, as many as they can learn in an hour on one core.
"""
from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from accel_tools.zoo.digits import npm_package

PACKAGE = "emoji-datasource-google@16.0.0"
GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
DRAWN = ("Animals & Nature", "Food & Drink", "Activities")


class Emoji(NamedTuple):
    """Pictures (N, 3, 32, 32) in [-1, 1], and for each its name in lower case, which is its prompt, and its group."""

    images: Tensor
    names: list[str]
    groups: list[str]


def load(groups: Sequence[str] = DRAWN) -> Emoji:
    """The pictures of `groups`, some of GROUPS, in the order of the package."""
    archive = npm_package(PACKAGE)
    packed = archive.parent / "emoji.pt"
    if not packed.exists():
        with tarfile.open(archive) as files:
            rows = [row for row in json.load(files.extractfile("package/emoji.json"))
                    if row["category"] in GROUPS and row["has_img_google"]]
            pictures = torch.stack([_picture(files.extractfile(f"package/img/google/64/{row['image']}").read())
                                    for row in rows])
        torch.save((pictures, [row["name"].lower() for row in rows], [row["category"] for row in rows]), packed)
    images, names, of = torch.load(packed)
    chosen = [i for i, group in enumerate(of) if group in groups]
    return Emoji(images[chosen], [names[i] for i in chosen], [of[i] for i in chosen])


def _picture(png: bytes) -> Tensor:
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    pixels = torch.frombuffer(bytearray(white.convert("RGB").tobytes()), dtype=torch.uint8)
    return avg_pool2d(pixels.view(64, 64, 3).permute(2, 0, 1).float() / 127.5 - 1, 2)
