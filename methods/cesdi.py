"""FISEdit - Accelerating Text-to-Image Editing via Cache-Enabled Sparse Diffusion Inference

Zihao Yu, Haoyang Li, Fangcheng Fu, Xupeng Miao, Bin Cui, AAAI 2024. arXiv:2305.17423. Code: Hankpipi/diffusers-hetu

Idea: an edited prompt changes a part of the picture. After a few steps the latents of the original and of the edit say which
part; from then on the edit computes only that part, and takes the rest of every layer from the original.

Map
    D, summed over the dense steps, each min-max normalised      difference
    threshold of Otsu, erosion, dilation                         otsu, opened
    mask of a coarser level: max-pooling                         pooled
    blocks of 2 x 2 with a masked pixel, windows around them     blocks, sparse_conv
    norm with the original's statistics                          norm_like
    queries of masked tokens, keys and values of all             _Tokens.around
    target = r new + (1 - r) old                                 _Tokens.around

Departures
    The official engine draws the original first and keeps the output of every layer and step, tens of gigabytes, for the edits
    to come. Here they are drawn together: the first prompt of a run is the original, the others are edits of it, with the same
    noise. Nothing is kept beyond a step; the original is paid once for all edits of a batch.
    The merge rate applies to attentions and MLPs, as in the engine where they are not fused. Keys and values of the text are
    computed in every step. Linear projections in and out of a transformer are computed for all tokens.
    Shares of steps stand for the official numbers, 10 of 50. In layers below `conv_size` and `token_size` edits are computed
    whole and with statistics of their own.
    Otsu always finds a mask, also where the prompts draw the same. With a mask of the user the last steps are dense instead.

Example
    >>> import torch
    >>> from methods import cesdi
    >>> cesdi.otsu(torch.tensor([0, 0, 0, 10, 10]))
    0
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from methods._core.attention import at_product
from methods._core.context import StepContext
from methods._core.denoiser import check_whole
from methods._core.patch import Patch, per_denoiser
from methods._core.site import Claim

__all__ = ["OFF", "PROMPTS", "TINY", "Config", "apply", "blocks", "difference", "norm_like", "opened", "otsu", "pooled",
           "sparse_conv"]

PROMPTS = 2                       # of a run: an original and an edit


@dataclass(frozen=True, kw_only=True)
class Config:
    dense: float = 0.2                         # share of the steps that run whole: the first, or with a mask the last
    mask: Sequence[Sequence[bool]] | None = None        # what to edit, of any size; None: found from the latents
    block: int = 2                             # side of the blocks of a convolution's output
    conv_size: int = 24 * 24                   # fewest pixels of a map whose convolutions and norms are sparse
    token_size: int = 48 * 48                  # fewest tokens of a transformer that is sparse
    merge: float = 0.9                         # r, weight of new values in attentions and MLPs
    on: bool = True                            # False: nothing is changed

    def __post_init__(self):
        for name in ("dense", "merge"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1")


OFF = Config(on=False)
TINY = Config(dense=0.4, conv_size=64, token_size=64)


def difference(edit: Tensor, original: Tensor) -> Tensor:
    """D: |edit - original| of latents (C, H, W), summed over channels, from 0 to 1 over the picture."""
    d = (edit.float() - original.float()).abs().sum(0)
    return (d - d.min()) / (d.max() - d.min()).clamp(min=1e-12)


def otsu(values: Tensor) -> int:
    """The threshold of integers 0 to 255 that parts them, at most it and above it, with the largest variance between the two.

    Of several such thresholds the lowest.
    """
    n = values.flatten().long().bincount(minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64, device=n.device)
    below, mass = n.cumsum(0), (n * levels).cumsum(0)
    above = below[-1] - below
    apart = mass / below.clamp(min=1) - (mass[-1] - mass) / above.clamp(min=1)
    return int((below * above * apart ** 2).argmax())


def opened(mask: Tensor) -> Tensor:
    """Erosion, then dilation of a mask (H, W) with a 2 x 2 element, whose other three pixels lie above and to the left."""
    x = mask[None, None].float()
    x = 1 - F.max_pool2d(F.pad(1 - x, (1, 0, 1, 0)), 2, 1)
    return F.max_pool2d(F.pad(x, (1, 0, 1, 0)), 2, 1)[0, 0] > 0.5


def found(total: Tensor) -> Tensor:
    """The mask (H, W) of what was summed over the dense steps."""
    d = (total - total.min()) / (total.max() - total.min()).clamp(min=1e-12)
    pixels = (255 * d).round()
    return opened(pixels > otsu(pixels))


def pooled(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask of a map of another size (h, w): a pixel is in it if one of those it stands for is."""
    return F.adaptive_max_pool2d(mask[None].float(), size)[0] > 0.5


def blocks(mask: Tensor, side: int) -> Tensor:
    """Which blocks (k, 2), by row and column, hold a masked pixel; the last ones may reach over the edge."""
    h, w = mask.shape
    x = F.pad(mask[None].float(), (0, -w % side, 0, -h % side))
    return (F.max_pool2d(x, side)[0] > 0.5).nonzero()


def sparse_conv(conv: nn.Conv2d, x: Tensor, base: Tensor, at: Tensor, side: int) -> Tensor:
    """The convolution of x (R, C, H, W) in the blocks `at` (k, 2) of its output; elsewhere `base` (R, C', H', W')."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    rows, (_, _, height, width), k = len(x), base.shape, len(at)
    if k == 0:
        return base.clone()
    high, wide = -(-height // side), -(-width // side)                  # blocks, with windows of
    tall, broad = (side - 1) * sh + dh * (kh - 1) + 1, (side - 1) * sw + dw * (kw - 1) + 1
    more = ((high - 1) * side * sh + tall - x.shape[2] - ph, (wide - 1) * side * sw + broad - x.shape[3] - pw)
    windows = F.pad(x, (pw, more[1], ph, more[0])).unfold(2, tall, side * sh).unfold(3, broad, side * sw)
    picked = windows[:, :, at[:, 0], at[:, 1]].transpose(1, 2).flatten(0, 1)                 # (R k, C, tall, broad)
    new = F.conv2d(picked, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
    out = F.pad(base, (0, -width % side, 0, -height % side)).unflatten(3, (wide, side)).unflatten(2, (high, side))
    out = out.transpose(3, 4).contiguous()                              # (R, C', high, wide, side, side)
    out[:, :, at[:, 0], at[:, 1]] = new.unflatten(0, (rows, k)).transpose(1, 2)
    return out.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., :height, :width]


def norm_like(norm: nn.GroupNorm, x: Tensor, original: Tensor) -> Tensor:
    """The group norm of x (R, C, H, W) with the statistics of `original`: scale * x + shift, of each sample and channel."""
    groups = original.float().flatten(2).unflatten(1, (norm.num_groups, -1)).flatten(2)
    mean, rstd = groups.mean(-1), (groups.var(-1, correction=0) + norm.eps).rsqrt()
    mean, rstd = (each.repeat_interleave(x.shape[1] // norm.num_groups, 1) for each in (mean, rstd))
    scale = rstd * norm.weight.float()
    shift = norm.bias.float() - mean * scale
    return (x.float() * scale[..., None, None] + shift[..., None, None]).to(x.dtype)


class _Editor:
    """What a call knows of its rows: those of the original, and of each edit those and its mask. The host fills it in."""

    def __init__(self, config: Config):
        self.config, self.sparse = config, False
        self.original: list[int] = []                       # rows of the batch, one for each part of guidance
        self.edits: list[tuple[list[int], Tensor]] = []     # rows, mask (H, W)
        self.places: dict[tuple[int, int], list[Tensor]] = {}

    def at(self, size: tuple[int, int]) -> list[Tensor] | None:
        """Active blocks of each edit in a map of this size; None where it is computed whole."""
        if not self.sparse or math.prod(size) < self.config.conv_size:
            return None
        if size not in self.places:
            self.places[size] = [blocks(pooled(mask, size), self.config.block) for _, mask in self.edits]
        return self.places[size]

    def conv(self, module: nn.Conv2d, forward: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(
            x.shape[2:], module.padding, module.dilation, module.kernel_size, module.stride, strict=True)]
        if (at := self.at(tuple(size))) is None:
            return forward(x, *args, **kwargs)
        base = forward(x[self.original], *args, **kwargs)
        return self.put(base, [sparse_conv(module, x[rows], base, here, self.config.block)
                               for (rows, _), here in zip(self.edits, at, strict=True)])

    def norm(self, module: nn.GroupNorm, forward: Callable, x: Tensor) -> Tensor:
        if x.ndim != 4 or self.at(tuple(x.shape[2:])) is None:
            return forward(x)
        original = x[self.original]
        return self.put(forward(original), [norm_like(module, x[rows], original) for rows, _ in self.edits])

    def put(self, base: Tensor, edits: list[Tensor]) -> Tensor:
        """One batch of the original's rows and those of each edit."""
        out = base.new_empty(len(base) * (1 + len(edits)), *base.shape[1:])
        for rows, part in zip((self.original, *(rows for rows, _ in self.edits)), (base, *edits), strict=True):
            out[rows] = part
        return out


class _Tokens:
    """An attention or the MLP of a block. The host sets `index`, the masked tokens (k,) of each edit; None: all of all."""

    def __init__(self, editor: _Editor, module: nn.Module, attends_itself: bool):
        self.editor, self.module, self.attends_itself = editor, module, attends_itself
        self.index: list[Tensor] | None = None

    def around(self, forward, x: Tensor, *args, **kwargs):
        if self.index is None:
            return forward(x, *args, **kwargs)

        def cut(rows: list[int]) -> dict[str, Any]:
            return tree_map(lambda a: a[rows] if torch.is_tensor(a) and a.shape[:1] == x.shape[:1] else a, kwargs)

        base, r, made = forward(x[self.editor.original], *args, **cut(self.editor.original)), self.editor.config.merge, []
        for (rows, _), index in zip(self.editor.edits, self.index, strict=True):
            new, old = self.of(index, forward, x[rows], *args, **cut(rows)), base[:, index]
            made.append(base.index_copy(1, index, r * new + (1 - r) * old))
        return self.editor.put(base, made)

    def of(self, index: Tensor, forward, x: Tensor, *args, **kwargs) -> Tensor:
        """The output for the tokens of `index` alone."""
        if not self.attends_itself:
            return forward(x[:, index], *args, **kwargs)
        if not getattr(self.module, "fused_projections", False):
            return forward(x[:, index], *args, **kwargs | {"encoder_hidden_states": x})
        asked = at_product(lambda product, q, k, v, **more: product(q[:, :, index], k, v, **more))
        return asked(forward, x, *args, **kwargs)


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Draw the first prompt of a run whole, and the others only where they differ from it.

    Args:
        target: a diffusers pipeline over a UNet. Run it with an original and its edits, all from the same noise: a list of
            generators with one seed.

    Raises:
        ValueError: not a UNet, a bare model, or already applied; in a run, a single prompt or other noise for an edit.
            RuntimeError: forward chunking.
    """
    patch = Patch(target, "cesdi")
    if not config.on:
        return patch
    over_pictures = patch.denoiser.row.grid.frames is None
    patch.require(patch.denoiser.unet if over_pictures else (), "UNet stages with convolutions over pictures")
    patch.require_pipeline()
    editor = _Editor(config)
    for module in patch.model.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            patch.around(module, partial(editor.conv, module))
        elif isinstance(module, nn.GroupNorm):
            patch.around(module, partial(editor.norm, module))
    layers = []
    for block in patch.denoiser.blocks:
        for part in (block.attn, block.cross, block.ff):
            if part is not None:
                layers.append((block, _Tokens(editor, part, part is block.attn)))
                patch.around(part, layers[-1][1].around, Claim.TOKENS)
    given = None if config.mask is None else torch.as_tensor(config.mask, dtype=torch.bool)
    patch.claim([patch.model], Claim.SKIP)                          # every step must be called by itself
    totals: dict[int, Tensor] = {}
    seen: list[int] = []

    def masks(context: StepContext, z: Tensor) -> list[Tensor] | None:
        """Of each edit, where this step is sparse."""
        if given is not None:
            sparse = context.i < context.steps - math.ceil(config.dense * context.steps)
            return [pooled(given.to(z.device), tuple(z.shape[2:]))] * (len(z) - 1) if sparse else None
        last = max(1, math.ceil(config.dense * context.steps))
        if context.i not in (*seen, 0) and context.i <= last:
            seen.append(context.i)
            for j in range(1, len(z)):
                totals[j] = totals.get(j, 0) + difference(z[j], z[0])
        return [found(totals[j]) for j in range(1, len(z))] if context.i >= last else None

    def decide(context: StepContext) -> None:
        n, parts, z = context.rows.prompts, range(len(context.rows.parts)), context.sample[:context.rows.prompts]
        if n < PROMPTS:
            raise ValueError("cesdi edits pictures beside their original: run with two prompts or more, the original first")
        if context.i == 0 and not all(torch.equal(each, z[0]) for each in z):
            raise ValueError("cesdi compares an edit with its original step by step: give all prompts the same noise, as a "
                             "list of generators with one seed")
        check_whole(patch.denoiser.blocks)
        now = masks(context, z)
        editor.sparse, editor.places = now is not None, {}
        editor.original = [part * n for part in parts]
        editor.edits = [([part * n + j for part in parts], mask) for j, mask in enumerate(now or (), start=1)]
        for block, layer in layers:
            size = context.grid(block)[1:]
            few = now is None or math.prod(size) < config.token_size
            layer.index = None if few else [pooled(mask, size).flatten().nonzero()[:, 0] for mask in now]
            for index in layer.index or ():
                torch._dynamo.maybe_mark_dynamic(index, 0)
        saved = sum(float(1 - mask.float().mean()) for mask in now or ())
        patch.counts["sparse" if now is not None else "dense"] += n - 1
        patch.tally(saved, n)

    def forget() -> None:
        totals.clear()
        seen.clear()

    patch.each_call(decide)
    patch.each_run(forget)
    patch.explain(lambda: "all of each picture is edited" if patch.counts["sparse"] else "all steps of this run are dense")
    return patch.on()
