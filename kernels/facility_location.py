"""Greedy facility location: the k tokens of each region that together resemble all of its tokens best.

S = cosines of a region; f(A) = sum_i max_{a in A} S[a, i]. The first pick is argmax_v sum_i S[v, i]; each later one is
argmax_v sum_i max(0, S[v, i] - m_i) among the rest, the largest gain, where m_i is the best similarity of token i to the
picks so far.
Of gains that differ by less than 1e-5 * (1 + the largest) the lowest position is taken: two tokens that gain from each
other alone tie exactly, which happens often, and rounding must not decide. No token is picked twice, even where nothing
gains. A zero vector has cosine 0 to everything.

x (G, n, C) any floating dtype, one region a row | picks (G, k) int64 in the order of picking, 1 <= k <= n. fp32
accumulation. Cost: 2*G*n*n*(C + k) FLOPs counted, the product and k passes over S. S is held for as many regions as
fit `TILE` values, at least one. The Triton kernel keeps S in registers, so n <= 128 there; `auto` takes the reference
beyond. Deterministic. Not differentiable.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels._dispatch import pick
from accel_kernels._shapes import TILE, check_float, row_norm

TIE = 1e-5
LARGEST = 128  # tokens a region of the Triton kernel may have


def facility_location(x: Tensor, k: int, *, impl: str = "auto") -> Tensor:
    """Picks (G, k) as in the module docstring; ValueError on a wrong shape or dtype, or k outside 1 to n."""
    check_float("x", x, "(G, n, C)")
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k is {k}, allowed: 1 to {x.shape[1]}")
    if impl == "triton" and x.shape[1] > LARGEST:
        raise ValueError(f"impl is 'triton', but regions have {x.shape[1]} tokens; allowed: up to {LARGEST}")
    return _facility_location(x, k, "reference" if impl == "auto" and x.shape[1] > LARGEST else impl)


def reference(x: Tensor, k: int) -> Tensor:
    """Eager torch. Small regions are picked from together."""
    regions, tokens, _ = x.shape
    picks = torch.empty(regions, k, dtype=torch.int64, device=x.device)
    group = max(1, TILE // (tokens * tokens))
    with torch.autocast(x.device.type, enabled=False):
        for g in range(0, regions, group):
            unit = x[g : g + group].float()
            unit = unit / row_norm(unit)
            similar = torch.bmm(unit, unit.transpose(1, 2))  # (g, v, i)
            best = torch.zeros_like(similar[:, :1])
            gain = similar.sum(dim=2)
            taken = torch.zeros_like(gain, dtype=torch.bool)
            for j in range(k):
                largest = gain.amax(dim=1, keepdim=True)
                chosen = (gain >= largest - TIE * (1 + largest.abs())).byte().argmax(dim=1)  # the first
                picks[g : g + group, j] = chosen
                row = similar.gather(1, chosen[:, None, None].expand_as(best))
                best = row if j == 0 else torch.maximum(best, row)
                if j + 1 < k:
                    taken.scatter_(1, chosen[:, None], True)
                    gain = (similar - best).clamp_min_(0).sum(dim=2).masked_fill_(taken, -torch.inf)
    return picks


@torch.library.custom_op("genaccel::facility_location", mutates_args=())
def _facility_location(x: Tensor, k: int, impl: str) -> Tensor:
    if pick(impl, x) == "triton":
        from accel_kernels._triton import facility_location as device

        return device.facility_location(x, k, TIE)
    return reference(x, k)


@_facility_location.register_fake
def _(x, k, impl):
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


@register_flop_formula(torch.ops.genaccel.facility_location)
def _flops(x, k, *args, **kwargs) -> int:
    return 2 * x[0] * x[1] * x[1] * (x[2] + k)
