"""Segment mean of tokens, the mean that keeps the norm, and the row gather that undoes both.

A `Segments` says, for every position n of a sequence, which row `source[b, n]` of the reduced sequence it goes to.
`merge(x, segments)[b, l]` = mean of the x[b, n] with source l (fp32 accumulation; a segment of one comes out unchanged,
an empty one is zero). `unmerge(y, segments)[b, n] = y[b, source[b, n]]`. `unmerge(merge(x))` is a projection.
`mlerp(x, segments)` is the mean m of each segment made as long as its longest token: max_n |x_n| * m / max(|m|, 1e-6), the
floor for tokens that cancel.

x (B, N, C), y (B, length, C) any floating dtype, dtype kept. Cost: one read and one write of the tokens, no FLOPs
counted. Merge and unmerge are differentiable (each gives the other's gradient), mlerp is not. Deterministic: a segment is
summed in position order. The Triton kernel of mlerp holds whole tokens, so C <= 4,096 there; `auto` takes the reference
beyond.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels import rows
from accel_kernels._dispatch import pick
from accel_kernels._shapes import check_float, check_index, flat_rows

SHORT = 1e-6  # a mean shorter than this is not blown up further
LARGEST = 4096  # channels that the Triton kernel of mlerp may hold


class Segments(NamedTuple):
    source: Tensor  # (B, N) int64, values in [0, length)
    order: Tensor  # (B*N,) int64, flat positions sorted by segment, then by position
    starts: Tensor  # (B*length,) int64, where each segment begins in `order`
    length: int  # rows of the reduced sequence


def segments(source: Tensor, length: int) -> Segments:
    """Sorts positions by segment. `source` (B, N) int64; its values are not checked."""
    check_index("source", source, source.shape[0])
    if length < 1:
        raise ValueError(f"length is {length}, allowed: at least 1")
    flat = flat_rows(source, length)
    count = _count(flat, source.shape[0] * length)
    return Segments(source, torch.argsort(flat, stable=True), count.cumsum(0) - count, length)


def merge(x: Tensor, segments: Segments, *, impl: str = "auto") -> Tensor:
    """Segment means (B, length, C); ValueError unless x is (B, N, C) for the N of `segments`."""
    _check(x, segments)
    return _merge(x, segments.source, segments.order, segments.starts, impl)


def mlerp(x: Tensor, segments: Segments, *, impl: str = "auto") -> Tensor:
    """Norm-preserving means (B, length, C); ValueError unless x is (B, N, C) for the N of `segments`."""
    _check(x, segments)
    if impl == "triton" and x.shape[2] > LARGEST:
        raise ValueError(f"impl is 'triton', but tokens have {x.shape[2]} channels; allowed: up to {LARGEST}")
    impl = "reference" if impl == "auto" and x.shape[2] > LARGEST else impl
    return _mlerp(x, segments.source, segments.order, segments.starts, impl)


def _check(x: Tensor, segments: Segments) -> None:
    check_float("x", x, "(B, N, C)")
    if x.shape[:2] != segments.source.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, allowed: {(*segments.source.shape, 'any')}")


def unmerge(y: Tensor, segments: Segments, *, impl: str = "auto") -> Tensor:
    """Rows of the reduced sequence back at every position (B, N, C); ValueError unless y is (B, length, C)."""
    check_float("y", y, "(B, length, C)")
    if y.shape[:2] != (segments.source.shape[0], segments.length):
        raise ValueError(f"y has shape {tuple(y.shape)}, allowed: {(len(segments.source), segments.length, 'any')}")
    return _unmerge(y, segments.source, segments.order, segments.starts, impl)


def reference(x: Tensor, source: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Mean by segment in eager torch: embedding_bag sums runs of `order`, the fastest of five ways on a CPU."""
    batch, _, channels = x.shape
    wide = x.reshape(-1, channels).to(torch.promote_types(x.dtype, torch.float32))
    total = F.embedding_bag(order, wide, starts, mode="sum")
    count = _count(flat_rows(source, len(starts) // batch), len(starts)).clamp_min_(1)
    return total.div_(count[:, None]).to(x.dtype).view(batch, -1, channels)


def reference_mlerp(x: Tensor, source: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Eager torch, in fp32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, norm = reference(wide, source, order, starts), torch.linalg.vector_norm(wide, dim=-1)
    longest = norm.new_zeros(mean.shape[:2]).scatter_reduce_(1, source, norm, "amax")
    scale = longest / torch.linalg.vector_norm(mean, dim=-1).clamp_min(SHORT)
    return mean.mul_(scale[..., None]).to(x.dtype)


def reference_unmerge(y: Tensor, source: Tensor) -> Tensor:
    """Row gather in eager torch."""
    return rows.reference(y, source)


def _count(flat: Tensor, bins: int) -> Tensor:
    return flat.new_zeros(bins).index_add_(0, flat, torch.ones_like(flat))  # bincount would wait for a GPU


@torch.library.custom_op("genaccel::merge", mutates_args=())
def _merge(x: Tensor, source: Tensor, order: Tensor, starts: Tensor, impl: str) -> Tensor:
    if pick(impl, x, source, order, starts) == "triton":
        from accel_kernels._triton import merge as device

        return device.merge(x, order, starts)
    return reference(x, source, order, starts)


@_merge.register_fake
def _merge_shape(x, source, order, starts, impl):
    return x.new_empty(x.shape[0], starts.shape[0] // x.shape[0], x.shape[2])


@torch.library.custom_op("genaccel::mlerp", mutates_args=())
def _mlerp(x: Tensor, source: Tensor, order: Tensor, starts: Tensor, impl: str) -> Tensor:
    if pick(impl, x, source, order, starts) == "triton":
        from accel_kernels._triton import merge as device

        return device.mlerp(x, order, starts, SHORT)
    return reference_mlerp(x, source, order, starts)


_mlerp.register_fake(_merge_shape)


@torch.library.custom_op("genaccel::unmerge", mutates_args=())
def _unmerge(y: Tensor, source: Tensor, order: Tensor, starts: Tensor, impl: str) -> Tensor:
    if pick(impl, y, source) == "triton":
        from accel_kernels._triton import rows as device

        return device.gather_rows(y, source)
    return reference_unmerge(y, source)


@_unmerge.register_fake
def _(y, source, order, starts, impl):
    return y.new_empty(*source.shape, y.shape[2])


def _setup(ctx, inputs, output):
    tokens, source, order, starts, ctx.impl = inputs
    ctx.save_for_backward(source, order, starts)
    ctx.length = starts.shape[0] // tokens.shape[0]


def _counts(source: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    ones = torch.ones_like(source)
    return source.new_zeros(source.shape[0], length).scatter_add(1, source, ones).clamp_min(1)[..., None].to(dtype)


def _merge_backward(ctx, grad):
    source, order, starts = ctx.saved_tensors
    grad = grad / _counts(source, ctx.length, grad.dtype)
    return _unmerge(grad, source, order, starts, ctx.impl), None, None, None, None


def _unmerge_backward(ctx, grad):
    source, order, starts = ctx.saved_tensors
    mean = _merge(grad, source, order, starts, ctx.impl)
    return mean * _counts(source, ctx.length, grad.dtype), None, None, None, None


_merge.register_autograd(_merge_backward, setup_context=_setup)
_unmerge.register_autograd(_unmerge_backward, setup_context=_setup)


@register_flop_formula([torch.ops.genaccel.merge, torch.ops.genaccel.mlerp, torch.ops.genaccel.unmerge])
def _flops(*args, **kwargs) -> int:
    return 0
