"""Facility location on a GPU: one program a region, whose similarities stay in registers while it picks."""

import torch
import triton
import triton.language as tl


def tile(tokens: int) -> dict[str, int]:
    """Launch constants: a whole region, rounded up; its similarities take tokens^2 registers of a program."""
    rows = max(16, triton.next_power_of_2(tokens))
    return {"BN": rows, "BC": 32, "num_warps": 4 if rows == 64 else max(1, rows * rows // 2048), "num_stages": 1}


@triton.jit
def _facility_location_fwd_kernel(p_x, p_picks, N, C, K, TIE, BN: tl.constexpr, BC: tl.constexpr):
    i_g = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BN)
    m_n = o_n < N  # not picked yet
    p_x += i_g * N * C
    b_dot = tl.zeros([BN, BN], dtype=tl.float32)
    b_square = tl.zeros([BN], dtype=tl.float32)
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        m_x = m_n[:, None] & (o_c < C)[None, :]
        b_x = tl.load(p_x + o_n.to(tl.int64)[:, None] * C + o_c[None, :], mask=m_x, other=0.0)  # [BN, BC]
        b_dot = tl.dot(b_x, tl.trans(b_x), b_dot, input_precision="ieee")
        b_wide = b_x.to(tl.float32)
        b_square += tl.sum(b_wide * b_wide, axis=1)
    b_norm = tl.maximum(tl.sqrt(b_square), 1.1754943508222875e-38)  # the smallest normal number
    b_dot = b_dot / b_norm[:, None] / b_norm[None, :]  # masked rows and columns stay zero: they gain and lose nothing
    b_best = tl.zeros([BN], dtype=tl.float32)
    b_gain = tl.where(m_n, tl.sum(b_dot, axis=1), float("-inf"))
    for k in range(0, K):
        largest = tl.max(b_gain, axis=0)
        m_best = (b_gain >= largest - TIE * (1 + tl.abs(largest)))
        chosen = tl.min(tl.where(m_best, o_n, BN), axis=0)
        tl.store(p_picks + i_g * K + k, chosen.to(tl.int64))
        b_row = tl.sum(tl.where((o_n == chosen)[:, None], b_dot, 0.0), axis=0)  # [BN]
        b_best = tl.where(k == 0, b_row, tl.maximum(b_best, b_row))
        m_n = m_n & (o_n != chosen)
        b_gain = tl.where(m_n, tl.sum(tl.maximum(b_dot - b_best[None, :], 0.0), axis=1), float("-inf"))


def facility_location(x: torch.Tensor, k: int, tie: float) -> torch.Tensor:
    """Picks (G, k) int64 for x (G, n, C)."""
    regions, tokens, channels = x.shape
    picks = torch.empty(regions, k, dtype=torch.int64, device=x.device)
    if regions:
        _facility_location_fwd_kernel[(regions,)](x.contiguous(), picks, tokens, channels, k, tie, **tile(tokens))
    return picks
