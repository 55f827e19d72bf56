"""How much every token resembles all others: the row sums of the cosine matrix, without the matrix.

`score[b, n] = sum_m cos(x_n, x_m) = <u_n, sum_m u_m>` with the unit vectors u. A zero vector has cosine 0 to everything.

x (B, N, C) any floating dtype | score (B, N) fp32, in fp32 accumulation. Cost: 2*B*N*C FLOPs counted, linear in N.
Deterministic. Not differentiable (tokens are ranked by it).
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels._dispatch import pick
from accel_kernels._shapes import check_float, row_norm


def similarity_sum(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Scores (B, N) as in the module docstring; ValueError on a wrong shape or dtype."""
    check_float("x", x, "(B, N, C)")
    return _similarity_sum(x, impl)


def reference(x: Tensor) -> Tensor:
    """Eager torch."""
    with torch.autocast(x.device.type, enabled=False):
        unit = x.float()
        unit = unit / row_norm(unit)
        return (unit @ unit.sum(1)[..., None]).squeeze(-1)


@torch.library.custom_op("genaccel::similarity_sum", mutates_args=())
def _similarity_sum(x: Tensor, impl: str) -> Tensor:
    if pick(impl, x) == "triton":
        from accel_kernels._triton import similarity_sum as device

        return device.similarity_sum(x)
    return reference(x)


@_similarity_sum.register_fake
def _(x, impl):
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@register_flop_formula(torch.ops.genaccel.similarity_sum)
def _flops(x, *args, **kwargs) -> int:
    return 2 * x[0] * x[1] * x[2]
