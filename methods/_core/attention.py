"""The attention product of a module, as it is: after projections, norms and positions, before the output projection.

Whatever processor a model or its user has put on the module has done its part by then, and does the rest behind it. So a
method that needs queries, keys, values or the map knows nothing of the module.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from accel_kernels.attention_mass import attention_mass
from methods._core.denoiser import Block

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _Product(TorchFunctionMode):
    """While it lasts, `function(product, q, k, v, **more)` is called in place of the first scaled dot product.

    Later products, those of the images of an adapter, pass by.
    """

    def __init__(self, function: Callable):
        super().__init__()
        self.function, self.seen = function, 0

    def __torch_function__(self, called, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if called is F.scaled_dot_product_attention:
            self.seen += 1
            if self.seen == 1:
                more = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
                return self.function(called, *(more.pop(name) for name in ARGUMENTS[:3]), **more)
        if called is torch.Tensor.unflatten:                  # which the compiler cannot trace under a mode
            x, dim, sizes = args
            dim = dim % x.ndim
            return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1:])
        return called(*args, **kwargs)


def at_product(function: Callable) -> Callable:
    """An around for an attention module: `function(product, q, k, v, **more)` instead of its scaled dot product.

    q, k, v (B, H, tokens, D) as the module's processor has made them, `more` its mask and scale, `product` what it would have
    called -> (B, H, tokens of q, D). `function` raises ValueError for what it cannot serve, such as a mask.

    Raises:
        RuntimeError: when it runs, the module makes no scaled dot product (linear attention, slices, another backend).
    """
    def around(forward, *args, **kwargs):
        mode = _Product(function)
        with mode:
            out = forward(*args, **kwargs)
        if not mode.seen:
            raise RuntimeError("this attention makes no scaled dot product that could be changed: it is linear, sliced, or "
                               "runs on another backend")
        return out
    return around


def unmasked(attn_mask: Tensor | None) -> None:
    """
    Raises:
        ValueError: there is a mask, under which rows cannot be merged, dropped or weighed by their number.
    """
    if attn_mask is not None:
        raise ValueError("only attention without a mask can be computed on fewer tokens, and this one has a mask")


def of_mask(block: Block, mask: Tensor | None, tokens: int, owner: Tensor, dim: int) -> Tensor | None:
    """The part of a mask (B, H, queries, keys), or one that broadcasts to it, that goes with fewer image tokens.

    `owner` (B, H or 1, rows) are the places among `tokens` of the image that stay, along the queries (dim -2) or keys (-1).
    """
    if mask is None or mask.shape[dim] == 1:
        return mask
    mask = mask[(None,) * (4 - mask.ndim)]
    image, rest = block.parted(mask, tokens, mask.ndim + dim)
    size = torch.broadcast_shapes(mask.shape[:2], owner.shape[:2])
    index = (owner[..., None] if dim == -2 else owner[..., None, :]).expand(*size, *(
        image.shape[2:3] if dim == -1 else owner.shape[2:]), owner.shape[2] if dim == -1 else image.shape[3])
    return block.joined(image.expand(*size, -1, -1).gather(dim, index), rest.expand(*size, -1, -1), mask.ndim + dim)


def with_mass(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None,
              **_) -> tuple[Tensor, Tensor]:
    """The product, and the attention mass (B, tokens) each token receives: column sums of the map, mean over heads.

    Under a mask, or with fewer heads of keys than of queries, the whole map is formed.
    """
    if attn_mask is None and q.shape[1] == k.shape[1]:
        return attention_mass(q, k, v, scale=scale)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    return out, mean_map(q, k, attn_mask, scale).sum(1)


def mean_map(q: Tensor, k: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_) -> Tensor:
    """Attention probabilities, mean over heads: q (B, H, N, D), k (B, H, T, D) -> (B, N, T) float32.

    `attn_mask` is the additive bias, or a mask that is true where a key counts.
    """
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask.float()
    return scores.softmax(-1).mean(1)


def entropy(maps: Tensor, guided: bool, mean_first: bool = False) -> Tensor:
    """Entropy of the rows of a cross-attention map (B, N, T). -> (B, N)

    With guidance both halves get that of their maps side by side, which is the mean of their entropies and log 2; with
    `mean_first` that of the mean of their maps.
    """
    def of(p: Tensor) -> Tensor:
        return -(p * (p + 1e-7).log()).sum(-1)

    if not guided:
        return of(maps)
    halves = maps.unflatten(0, (2, -1))
    return (of(halves.mean(0)) if mean_first else of(halves / 2).sum(0)).repeat(2, 1)


def band_share(tokens: int, window: int) -> float:
    """What `banded` computes, as a share of the whole map."""
    return min(1.0, 3 * window * math.ceil(tokens / window) * window / tokens ** 2)


def banded(product: Callable, q: Tensor, k: Tensor, v: Tensor, window: int, k_text: Tensor, v_text: Tensor,
           **more) -> Tensor:
    """Attention of each token to those at most `window` away, and to all of the text.

    Queries go in pieces of `window`, each with the keys of three pieces under a mask, where that is less than the whole map.

    q, k, v (B, H, N, D), k_text, v_text (B, H, T, D), where T may be 0 -> (B, H, N, D)
    """
    (b, h, n, d), w, words = q.shape, window, k_text.shape[2]
    if band_share(n, w) == 1:
        place = torch.arange(n, device=q.device)
        near = F.pad((place[:, None] - place).abs() <= w, (0, words), value=True)
        return product(q, torch.cat([k, k_text], 2), torch.cat([v, v_text], 2), attn_mask=near, **more)
    pieces = math.ceil(n / w)
    pad = pieces * w - n

    def seen(x: Tensor, text: Tensor) -> Tensor:
        """(B, H, N, D), (B, H, T, D) -> (B * H, pieces, 3 w + T, D)"""
        x = F.pad(x, (0, 0, w, w + pad)).flatten(0, 1).unfold(1, 3 * w, w).mT
        return torch.cat([x, text.flatten(0, 1)[:, None].expand(-1, pieces, -1, -1)], 2)

    i, j = torch.arange(w, device=q.device)[:, None], torch.arange(-w, 2 * w, device=q.device)
    place = j + w * torch.arange(pieces, device=q.device)[:, None, None]
    near = F.pad(((i - j).abs() <= w) & (place >= 0) & (place < n), (0, words), value=True)
    q = F.pad(q, (0, 0, 0, pad)).reshape(b * h, pieces, w, d)
    out = product(q, seen(k, k_text), seen(v, v_text), attn_mask=near, **more)
    return out.reshape(b, h, pieces * w, d)[:, :, :n]
