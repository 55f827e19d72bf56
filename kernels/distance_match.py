"""Nearest destination of every source token, by squared Euclidean distance.

`distance[b, i] = min_j |x[b, src_i] - x[b, dst_j]|^2` and `index[b, i]` = that j, the lowest one on equal distances (equal
as computed). Formed as |s|^2 + |d|^2 - 2 s.d and cut off at zero, below which rounding alone could take it.

x (B, N, C) any floating dtype | src (S,) or (B, S), dst (D,) or (B, D) int64 | distance (B, S) fp32, index (B, S) int64.
Cost: 2*B*S*D*C FLOPs in fp32 accumulation; the S x D distances exist one tile at a time. Deterministic. Not
differentiable (a partner is a choice).
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels._dispatch import pick
from accel_kernels._shapes import best_column, check_match, flat_rows, product_tiles


def distance_match(x: Tensor, src: Tensor, dst: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(distance, index) as in the module docstring; ValueError on a wrong shape, dtype or an empty `dst`."""
    return _distance_match(x, *check_match(x, src, dst), impl)


def reference(x: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Tiled eager torch; src (B, S), dst (B, D)."""
    (batch, length, channels), targets = x.shape, dst.shape[1]
    target = x.reshape(-1, channels).index_select(0, flat_rows(dst, length)).float().view(batch, targets, channels)
    square = target.square().sum(-1)[:, None]
    distance = x.new_empty(src.shape, dtype=torch.float32)
    index = torch.empty_like(distance, dtype=torch.int64)
    with torch.autocast(x.device.type, enabled=False):
        for b, s, query, product in product_tiles(x, src, target):
            best, index[b, s] = best_column(product.sub_(square[b], alpha=0.5))
            distance[b, s] = (query.square().sum(-1) - 2 * best).clamp_min_(0)
    return distance, index


@torch.library.custom_op("genaccel::distance_match", mutates_args=())
def _distance_match(x: Tensor, src: Tensor, dst: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    if pick(impl, x, src, dst) == "triton":
        from accel_kernels._triton import distance_match as device

        return device.distance_match(x, src, dst)
    return reference(x, src, dst)


@_distance_match.register_fake
def _(x, src, dst, impl):
    return x.new_empty(src.shape, dtype=torch.float32), src.new_empty(src.shape)


@register_flop_formula(torch.ops.genaccel.distance_match)
def _flops(x, src, dst, *args, **kwargs) -> int:
    return 2 * src[0] * src[1] * dst[1] * x[2]
