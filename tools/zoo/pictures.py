"""Generated images side by side, as PNG: still ones in a row, clips as an animation and as a strip of their frames."""
from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCALE = 2                                                  # screen pixels a pixel, both ways


def row(images: Tensor) -> Image.Image:
    """Images (n, C, H, W) in [0, 1] beside each other; C is 1 or 3."""
    pixels = (images.clamp(0, 1) * 255).round().byte()
    line = torch.cat(list(pixels), -1).permute(1, 2, 0)
    picture = Image.fromarray(line.squeeze(-1).numpy())
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


def frames(clips: Tensor) -> list[Image.Image]:
    """Clips (n, F, C, H, W) beside each other, a picture a frame."""
    return [row(clips[:, i]) for i in range(clips.shape[1])]


def strip(clips: Tensor) -> Image.Image:
    """The first clip of (n, F, C, H, W), its frames beside each other."""
    return row(clips[0])


def address(*pictures: Image.Image, seconds: float = 0.16) -> str:
    """A data address of a PNG, so that a page is one file; several pictures become an endless animation."""
    png = io.BytesIO()
    first, *others = pictures
    more = dict(save_all=True, append_images=others, duration=int(1000 * seconds), loop=0) if others else {}
    first.save(png, "PNG", **more)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def sheet(rows: Sequence[Image.Image]) -> Image.Image:
    """The rows below each other."""
    whole = Image.new(rows[0].mode, (max(each.width for each in rows), sum(each.height for each in rows)))
    top = 0
    for each in rows:
        whole.paste(each, (0, top))
        top += each.height
    return whole


def named(rows: Mapping[str, Image.Image], margin: int = 150) -> Image.Image:
    """The rows below each other, each with its name, of a line or two, to the left."""
    width, height = max(each.width for each in rows.values()), sum(each.height for each in rows.values())
    whole = Image.new("RGB", (width + margin, height), "white")
    top = 0
    for name, each in rows.items():
        whole.paste(each, (margin, top))
        ImageDraw.Draw(whole).multiline_text((8, top + each.height // 2), name, fill="black", anchor="lm", spacing=6,
                                             font=ImageFont.load_default(size=15))
        top += each.height
    return whole
