"""Row sums of the cosine matrix on a GPU: unit vectors are summed in strips, then every token meets their sum."""

import torch
import triton
import triton.language as tl

from accel_kernels._triton.cosine_match import row_norm

STRIP = 256  # tokens one program sums
SUM = {"BN": 32, "BC": 64, "num_warps": 4}
DOT = {"BN": 16, "BC": 128, "num_warps": 4}


@triton.jit
def _unit_sum_fwd_kernel(p_x, p_norm, p_part, N, C, STRIP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    i_s, strips = tl.program_id(0), tl.num_programs(0)
    i_b = tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_sum = tl.zeros([BC], dtype=tl.float32)
    for n in range(i_s * STRIP, tl.minimum(N, (i_s + 1) * STRIP), BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < N
        o_x = (i_b * N + o_n)[:, None] * C + o_c[None, :]
        b_x = tl.load(p_x + o_x, mask=m_n[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BN, BC]
        b_norm = tl.load(p_norm + i_b * N + o_n, mask=m_n, other=1.0)
        b_sum += tl.sum(b_x / b_norm[:, None], axis=0)
    tl.store(p_part + (i_b * strips + i_s) * C + o_c, b_sum, mask=m_c)


@triton.jit
def _unit_dot_fwd_kernel(p_x, p_norm, p_sum, p_score, N, C, BN: tl.constexpr, BC: tl.constexpr):
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_dot = tl.zeros([BN], dtype=tl.float32)
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        m_c = o_c < C
        o_x = (i_b * N + o_n)[:, None] * C + o_c[None, :]
        b_x = tl.load(p_x + o_x, mask=m_n[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BN, BC]
        b_dot += tl.sum(b_x * tl.load(p_sum + i_b * C + o_c, mask=m_c, other=0.0)[None, :], axis=1)
    b_norm = tl.load(p_norm + i_b * N + o_n, mask=m_n, other=1.0)
    tl.store(p_score + i_b * N + o_n, b_dot / b_norm, mask=m_n)


def similarity_sum(x: torch.Tensor) -> torch.Tensor:
    """Scores (B, N) for x (B, N, C)."""
    x = x.contiguous()
    batch, length, channels = x.shape
    score = torch.empty(batch, length, dtype=torch.float32, device=x.device)
    if score.numel():
        norm, strips = row_norm(x), triton.cdiv(length, STRIP)
        part = torch.empty(batch, strips, channels, dtype=torch.float32, device=x.device)
        grid = (strips, triton.cdiv(channels, SUM["BC"]), batch)
        _unit_sum_fwd_kernel[grid](x, norm, part, length, channels, STRIP=STRIP, **SUM)
        tiles = (triton.cdiv(length, DOT["BN"]), batch)
        _unit_dot_fwd_kernel[tiles](x, norm, part.sum(1), score, length, channels, **DOT)
    return score
