"""Attention with column sums on a GPU: a flash forward that keeps the log-sum-exp, then a pass over the columns."""

import torch
import triton
import triton.language as tl

# (queries, keys) a program holds, by head width rounded up: what fits in registers on every target of
# tools/compile_kernels.py. fp32 has no IEEE tensor-core path: smaller tiles, and no pipeline to keep in registers.
HALF = {64: (128, 64), 128: (64, 32), 256: (64, 32)}
FP32 = {64: (64, 32), 128: (32, 16), 256: (32, 16)}


def tile(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Launch constants; the head width W is one of them, so that its divisibility widens the loads."""
    if width > 256:
        raise ValueError(f"D is {width}, allowed by the Triton kernels: up to 256")
    lanes = max(64, triton.next_power_of_2(width))
    (queries, keys), stages = (FP32[lanes], 1) if dtype == torch.float32 else (HALF[lanes], 2)
    return {"W": width, "BW": lanes, "BN": queries, "BM": keys, "num_warps": 8, "num_stages": stages}


@triton.jit
def stream_keys(
    b_q, p_k, p_v, first, last, scale,
    W: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Queries b_q [BN, BW] over the keys first to last - 1 of one head: weighted sum of values, row maxima, row sums."""
    o_w = tl.arange(0, BW)
    m_w = o_w < W
    b_max = tl.full([BN], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BN], dtype=tl.float32)
    b_out = tl.zeros([BN, BW], dtype=tl.float32)
    for m in range(first, last, BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < last
        o_k = o_m.to(tl.int64)[:, None] * W + o_w[None, :]
        m_k = m_m[:, None] & m_w[None, :]
        b_k = tl.load(p_k + o_k, mask=m_k, other=0.0)  # [BM, BW]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BN, BM]
        b_s = tl.where(m_m[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_p = tl.exp(b_s - b_new[:, None])
        b_decay = tl.exp(b_max - b_new)
        b_v = tl.load(p_v + o_k, mask=m_k, other=0.0)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_max = b_new
    return b_out, b_max, b_sum


@triton.jit
def _attention_mass_fwd_kernel(
    p_q, p_k, p_v, p_out, p_lse, N, M, scale,
    W: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)  # batch * heads
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_w = tl.arange(0, BW)
    m_n, m_w = o_n < N, o_w < W
    p_q, p_out, p_lse = p_q + i_h * N * W, p_out + i_h * N * W, p_lse + i_h * N
    o_q = o_n.to(tl.int64)[:, None] * W + o_w[None, :]
    m_q = m_n[:, None] & m_w[None, :]
    b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)  # [BN, BW]
    b_out, b_max, b_sum = stream_keys(b_q, p_k + i_h * M * W, p_v + i_h * M * W, 0, M, scale, W, BN, BM, BW)
    tl.store(p_out + o_q, (b_out / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + o_n, b_max + tl.log(b_sum), mask=m_n)


@triton.jit
def _column_mass_fwd_kernel(
    p_q, p_k, p_lse, p_mass, N, M, scale,
    W: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)  # batch * heads
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_w = tl.arange(0, BW)
    m_m, m_w = o_m < M, o_w < W
    p_q, p_k, p_lse, p_mass = p_q + i_h * N * W, p_k + i_h * M * W, p_lse + i_h * N, p_mass + i_h * M
    o_k = o_m.to(tl.int64)[:, None] * W + o_w[None, :]
    b_k = tl.load(p_k + o_k, mask=m_m[:, None] & m_w[None, :], other=0.0)  # [BM, BW]
    b_mass = tl.zeros([BM], dtype=tl.float32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < N
        o_q = o_n.to(tl.int64)[:, None] * W + o_w[None, :]
        b_q = tl.load(p_q + o_q, mask=m_n[:, None] & m_w[None, :], other=0.0)  # [BN, BW]
        b_lse = tl.load(p_lse + o_n, mask=m_n, other=float("inf"))  # masked queries weigh exp(-inf) = 0
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BN, BM]
        b_mass += tl.sum(tl.exp(b_s - b_lse[:, None]), axis=0)
    tl.store(p_mass + o_m, b_mass, mask=m_m)


def attention_mass(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, N, D) and mass (B, M) fp32 for q (B, H, N, D), k and v (B, H, M, D)."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    constants = tile(q.dtype, width)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    mass = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    if batch * heads:
        if queries:
            grid = (triton.cdiv(queries, constants["BN"]), batch * heads)
            _attention_mass_fwd_kernel[grid](q, k, v, out, lse, queries, keys, scale, **constants)
        grid = (triton.cdiv(keys, constants["BM"]), batch * heads)
        _column_mass_fwd_kernel[grid](q, k, lse, mass, queries, keys, scale, **constants)
    return out, mass.mean(dim=1)
