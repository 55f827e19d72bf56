"""Best cosine partner of every source token among the destination tokens.

`score[b, i] = max_j cos(x[b, src_i], x[b, dst_j])` and `index[b, i]` = that j, the lowest one on equal scores (equal as
computed: a GEMM may round two equal columns apart). A zero vector has cosine 0 to everything.

x (B, N, C) any floating dtype | src (S,) or (B, S), dst (D,) or (B, D) int64 | score (B, S) fp32, index (B, S) int64.
Cost: 2*B*S*D*C FLOPs in fp32 accumulation; the S x D scores exist one tile at a time. Only the destinations are
normalised before the product: the norm of a source scales its whole row, so it is divided out after the maximum.
Deterministic. Not differentiable (a partner is a choice).
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels._dispatch import pick
from accel_kernels._shapes import best_column, check_match, flat_rows, product_tiles, row_norm


def cosine_match(x: Tensor, src: Tensor, dst: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(score, index) as in the module docstring; ValueError on a wrong shape, dtype or an empty `dst`."""
    return _cosine_match(x, *check_match(x, src, dst), impl)


def reference(x: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Tiled eager torch; src (B, S), dst (B, D)."""
    (batch, length, channels), targets = x.shape, dst.shape[1]
    target = x.reshape(-1, channels).index_select(0, flat_rows(dst, length)).float()
    target = (target / row_norm(target)).view(batch, targets, channels)
    score = x.new_empty(src.shape, dtype=torch.float32)
    index = torch.empty_like(score, dtype=torch.int64)
    with torch.autocast(x.device.type, enabled=False):
        for b, s, query, product in product_tiles(x, src, target):
            best, index[b, s] = best_column(product)
            score[b, s] = best / row_norm(query).squeeze(-1)
    return score, index


@torch.library.custom_op("genaccel::cosine_match", mutates_args=())
def _cosine_match(x: Tensor, src: Tensor, dst: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    if pick(impl, x, src, dst) == "triton":
        from accel_kernels._triton import cosine_match as device

        return device.cosine_match(x, src, dst)
    return reference(x, src, dst)


@_cosine_match.register_fake
def _(x, src, dst, impl):
    return x.new_empty(src.shape, dtype=torch.float32), src.new_empty(src.shape)


@register_flop_formula(torch.ops.genaccel.cosine_match)
def _flops(x, src, dst, *args, **kwargs) -> int:
    return 2 * src[0] * src[1] * dst[1] * x[2]
