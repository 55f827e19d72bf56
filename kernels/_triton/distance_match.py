"""Distance match on a GPU: a GEMM whose distances never leave the program that computed them."""

import torch
import triton
import triton.language as tl

from accel_kernels._triton.cosine_match import launch, tile


@triton.jit
def _distance_match_fwd_kernel(
    p_x, p_src, p_dst, p_distance, p_index,
    N, C, S, D, d_span,  # tokens, channels, sources, destinations, destinations per split
    BS: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_split, splits = tl.program_id(1), tl.num_programs(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    m_s = o_s < S
    b_src = i_b * N + tl.load(p_src + i_b * S + o_s, mask=m_s, other=0)
    b_best = tl.full([BS], float("inf"), dtype=tl.float32)
    b_index = tl.zeros([BS], dtype=tl.int32)
    b_own = tl.zeros([BS], dtype=tl.float32)
    for d in range(i_split * d_span, tl.minimum(D, (i_split + 1) * d_span), BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        b_dst = i_b * N + tl.load(p_dst + i_b * D + o_d, mask=m_d, other=0)
        b_dot = tl.zeros([BS, BD], dtype=tl.float32)
        b_square = tl.zeros([BD], dtype=tl.float32)
        b_own = tl.zeros([BS], dtype=tl.float32)
        for c in range(0, C, BC):
            o_c = c + tl.arange(0, BC)
            m_c = o_c < C
            b_q = tl.load(p_x + b_src[:, None] * C + o_c[None, :], mask=m_s[:, None] & m_c[None, :], other=0.0)
            b_k = tl.load(p_x + b_dst[None, :] * C + o_c[:, None], mask=m_d[None, :] & m_c[:, None], other=0.0)
            b_dot = tl.dot(b_q, b_k, b_dot, input_precision="ieee")
            b_wide = b_k.to(tl.float32)
            b_square += tl.sum(b_wide * b_wide, axis=0)
            b_wide = b_q.to(tl.float32)
            b_own += tl.sum(b_wide * b_wide, axis=1)
        b_part = tl.where(m_d[None, :], b_square[None, :] - 2 * b_dot, float("inf"))
        b_min, b_arg = tl.min(b_part, axis=1, return_indices=True, return_indices_tie_break_left=True)
        m_better = b_min < b_best  # strict: an earlier column keeps a tie
        b_index = tl.where(m_better, d + b_arg, b_index)
        b_best = tl.where(m_better, b_min, b_best)
    o_out = (i_b * splits + i_split) * S + o_s
    tl.store(p_distance + o_out, tl.maximum(b_best + b_own, 0.0), mask=m_s)
    tl.store(p_index + o_out, b_index.to(tl.int64), mask=m_s)


def distance_match(x: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance and index (B, S) for x (B, N, C), src (B, S), dst (B, D)."""
    x, src, dst = x.contiguous(), src.contiguous(), dst.contiguous()
    (batch, length, channels), sources, targets = x.shape, src.shape[1], dst.shape[1]
    constants = tile(x.dtype)
    grid, span = launch(batch, sources, targets, constants)
    distance = torch.empty(batch, grid[1], sources, dtype=torch.float32, device=x.device)
    index = torch.empty(batch, grid[1], sources, dtype=torch.int64, device=x.device)
    if distance.numel():
        _distance_match_fwd_kernel[grid](
            x, src, dst, distance, index, length, channels, sources, targets, span, **constants
        )
    best, split = distance.min(dim=1)  # on a tie the first split, which holds the lower columns
    return best, index.gather(1, split[:, None])[:, 0]
