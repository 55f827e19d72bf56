"""Agent attention on a GPU: the agents are few, so the keys are split among programs; reading them ends with the shortcut."""

import torch
import triton
import triton.language as tl

from accel_kernels._triton import attention_mass
from accel_kernels._triton.attention_mass import stream_keys
from accel_kernels._triton.cosine_match import launch


def tile(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Launch constants: as for attention_mass, smaller where the shortcut would not fit beside it in registers."""
    constants = attention_mass.tile(dtype, width)
    wide = constants["BW"] == 256
    if dtype == torch.float32:
        return constants | {"BN": 32, "BM": 16} | ({"num_stages": 2} if wide else {"num_warps": 4})
    return constants | ({"BN": 32, "BM": 32, "num_warps": 4} if wide else {})


@triton.jit
def _agents_read_fwd_kernel(
    p_a, p_k, p_v, p_part, p_lse, N, M, scale, m_span,
    W: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_split, splits = tl.program_id(1), tl.num_programs(1)
    i_h = tl.program_id(2).to(tl.int64)  # batch * heads
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_w = tl.arange(0, BW)
    m_n, m_w = o_n < N, o_w < W
    o_row = o_n.to(tl.int64)[:, None] * W + o_w[None, :]
    m_a = m_n[:, None] & m_w[None, :]
    b_a = tl.load(p_a + i_h * N * W + o_row, mask=m_a, other=0.0)  # [BN, BW]
    first = i_split * m_span
    last = tl.minimum(M, first + m_span)
    b_out, b_max, b_sum = stream_keys(b_a, p_k + i_h * M * W, p_v + i_h * M * W, first, last, scale, W, BN, BM, BW)
    i_part = (i_h * splits + i_split) * N
    tl.store(p_part + i_part * W + o_row, b_out / b_sum[:, None], mask=m_a)
    tl.store(p_lse + i_part + o_n, b_max + tl.log(b_sum), mask=m_n)


@triton.jit
def _queries_read_fwd_kernel(
    p_q, p_a, p_g, p_v, p_out, N, M, scale, shortcut,
    W: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)  # batch * heads
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_w = tl.arange(0, BW)
    p_q, p_v, p_out = p_q + i_h * N * W, p_v + i_h * N * W, p_out + i_h * N * W
    o_q = o_n.to(tl.int64)[:, None] * W + o_w[None, :]
    m_q = (o_n < N)[:, None] & (o_w < W)[None, :]
    b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)  # [BN, BW]
    b_out, _, b_sum = stream_keys(b_q, p_a + i_h * M * W, p_g + i_h * M * W, 0, M, scale, W, BN, BM, BW)
    b_v = tl.load(p_v + o_q, mask=m_q, other=0.0).to(tl.float32)
    tl.store(p_out + o_q, (b_out / b_sum[:, None] + shortcut * b_v).to(p_out.dtype.element_ty), mask=m_q)


def agent_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, scale: float, sharp: float, shortcut: float
) -> torch.Tensor:
    """(B, H, N, D) for q, k, v (B, H, N, D) and agents a (B, H, n, D)."""
    (batch, heads, tokens, width), agents = q.shape, a.shape[2]
    q, k, v, a = q.contiguous(), k.contiguous(), v.contiguous(), a.contiguous()
    constants = tile(q.dtype, width)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch * heads:
        grid, span = launch(batch * heads, agents, tokens, {"BS": constants["BN"], "BD": constants["BM"]})
        runs = grid[1]
        part = torch.empty(batch, heads, runs, agents, width, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, heads, runs, agents, dtype=torch.float32, device=q.device)
        _agents_read_fwd_kernel[grid](a, k, v, part, lse, agents, tokens, scale, span, **constants)
        gathered = (part * lse.softmax(2)[..., None]).sum(2).to(q.dtype)
        tiles = (triton.cdiv(tokens, constants["BN"]), batch * heads)
        _queries_read_fwd_kernel[tiles](q, a, gathered, v, out, tokens, agents, sharp, shortcut, **constants)
    return out
