"""Splits positions into the k with the largest scores and the rest, both in ascending position order.

The cut of token merging (which sources merge) and of token-wise caching (which tokens are computed again). On equal
scores the lower position is chosen first, so the split is a function of the values alone. NaN counts as -inf.

score (B, N) any floating dtype | chosen (B, k), rest (B, N-k) int64; 0 <= k <= N. Cost: a selection and one scan, no
sort of the row, no FLOPs counted. Deterministic. Not differentiable.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels._dispatch import pick
from accel_kernels._shapes import check_float


def topk_partition(score: Tensor, k: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(chosen, rest) as in the module docstring; ValueError unless score is (B, N) and 0 <= k <= N."""
    check_float("score", score, "(B, N)")
    if not 0 <= k <= score.shape[1]:
        raise ValueError(f"k is {k}, allowed: 0 to {score.shape[1]}")
    return _topk_partition(score, k, impl)


def reference(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eager torch: everything above the k-th largest value, then ties from the left until k are taken."""
    batch, length = score.shape
    if k in (0, length):
        everything = torch.arange(length, device=score.device).repeat(batch, 1)
        nothing = everything.new_empty(batch, 0)
        return (nothing, everything) if k == 0 else (everything, nothing)
    score = torch.where(score.isnan(), -torch.inf, score)
    cut = score.kthvalue(length - k + 1, dim=1, keepdim=True).values
    above, tie = score > cut, score == cut
    take = above | (tie & (tie.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return take.nonzero()[:, 1].view(batch, k), (~take).nonzero()[:, 1].view(batch, length - k)


@torch.library.custom_op("genaccel::topk_partition", mutates_args=())
def _topk_partition(score: Tensor, k: int, impl: str) -> tuple[Tensor, Tensor]:
    if pick(impl, score) == "triton":
        from accel_kernels._triton import topk as device

        return device.topk_partition(score, k)
    return reference(score, k)


@_topk_partition.register_fake
def _(score, k, impl):
    batch, length = score.shape
    return score.new_empty((batch, k), dtype=torch.int64), score.new_empty((batch, length - k), dtype=torch.int64)


@register_flop_formula(torch.ops.genaccel.topk_partition)
def _flops(*args, **kwargs) -> int:
    return 0
