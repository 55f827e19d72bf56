"""Top-k partition on a GPU: the k-th largest value bit by bit, then one scan that places every position."""

import torch
import triton
import triton.language as tl

TILE = {"BN": 2048, "num_warps": 8}


@triton.jit
def _ordered_key(p_score, o_n, m_n):
    """int32 keys that compare as the scores do: -0.0 equals 0.0, NaN equals -inf, masked lanes lie below all."""
    b_s = tl.load(p_score + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_s = tl.where(b_s == b_s, b_s, float("-inf"))
    b_s = tl.where(b_s == 0.0, 0.0, b_s)
    b_bits = b_s.to(tl.int32, bitcast=True)
    return tl.where(m_n, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), -2147483648)


@triton.jit
def _count_from(p_score, N, cut, BN: tl.constexpr):
    count = tl.zeros([], dtype=tl.int32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        count += tl.sum((_ordered_key(p_score, o_n, o_n < N) >= cut).to(tl.int32), axis=0)
    return count


@triton.jit
def _topk_partition_fwd_kernel(p_score, p_chosen, p_rest, N, K, BN: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    p_score += i_b * N
    p_chosen += i_b * K
    p_rest += i_b * (N - K)
    cut = tl.where(_count_from(p_score, N, 0, BN) >= K, 0, -2147483648)  # largest key with K scores at or above it
    for bit in range(0, 31):
        higher = cut | (1 << (30 - bit))
        cut = tl.where(_count_from(p_score, N, higher, BN) >= K, higher, cut)
    above = _count_from(p_score, N, cut + 1, BN)  # meaningless for K = 0, where nothing ties
    taken = tl.zeros([], dtype=tl.int32)
    ties = tl.zeros([], dtype=tl.int32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < N
        b_key = _ordered_key(p_score, o_n, m_n)
        b_tie = (b_key == cut).to(tl.int32)
        m_tie = (b_tie > 0) & (ties + tl.cumsum(b_tie, axis=0) <= K - above)
        b_take = ((b_key > cut) | m_tie).to(tl.int32)
        o_chosen = taken + tl.cumsum(b_take, axis=0) - b_take  # chosen positions before this one
        tl.store(p_chosen + o_chosen, o_n.to(tl.int64), mask=m_n & (b_take > 0))
        tl.store(p_rest + o_n - o_chosen, o_n.to(tl.int64), mask=m_n & (b_take == 0))
        taken += tl.sum(b_take, axis=0)
        ties += tl.sum(b_tie, axis=0)


def topk_partition(score: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen (B, k) and rest (B, N-k), ascending, for score (B, N)."""
    batch, length = score.shape
    chosen = torch.empty(batch, k, dtype=torch.int64, device=score.device)
    rest = torch.empty(batch, length - k, dtype=torch.int64, device=score.device)
    if score.numel():
        _topk_partition_fwd_kernel[(batch,)](score.contiguous(), chosen, rest, length, k, **TILE)
    return chosen, rest
