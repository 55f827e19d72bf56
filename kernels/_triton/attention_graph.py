"""The attention map as a graph on a GPU: tiles of the map are formed again from the rows' log-sums, in registers."""

import torch
import triton
import triton.language as tl

from accel_kernels._triton import attention_mass


def tile(dtype: torch.dtype, width: int, *, pairs: bool = False) -> dict[str, int]:
    """Launch constants; `pairs` where queries and keys both change in the inner loop: no room to pipeline."""
    constants = attention_mass.tile(dtype, width)
    wide, single = constants["BW"] == 256, dtype == torch.float32
    if not pairs:
        return constants | {"num_warps": 4 if single else constants["num_warps"]}
    if wide and single:
        constants |= {"BN": 16, "BM": 32}
    return constants | {"num_warps": 4 if wide else constants["num_warps"], "num_stages": 1}


@triton.jit
def _log_sums_fwd_kernel(
    p_q, p_k, p_lse, N, M, scale,
    W: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)  # batch * heads
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_w = tl.arange(0, BW)
    m_n, m_w = o_n < N, o_w < W
    p_q, p_k, p_lse = p_q + i_h * N * W, p_k + i_h * M * W, p_lse + i_h * N
    o_q = o_n.to(tl.int64)[:, None] * W + o_w[None, :]
    b_q = tl.load(p_q + o_q, mask=m_n[:, None] & m_w[None, :], other=0.0)  # [BN, BW]
    b_max = tl.full([BN], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BN], dtype=tl.float32)
    for m in range(0, M, BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < M
        o_k = o_m.to(tl.int64)[:, None] * W + o_w[None, :]
        b_k = tl.load(p_k + o_k, mask=m_m[:, None] & m_w[None, :], other=0.0)  # [BM, BW]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BN, BM]
        b_s = tl.where(m_m[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_s - b_new[:, None]), axis=1)
        b_max = b_new
    tl.store(p_lse + o_n, b_max + tl.log(b_sum), mask=m_n)


@triton.jit
def _flow_fwd_kernel(
    p_q, p_k, p_lse, p_s, p_out, N, M, scale,
    W: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)  # batch * heads
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_w = tl.arange(0, BW)
    m_m, m_w = o_m < M, o_w < W
    p_q, p_k, p_lse = p_q + i_h * N * W, p_k + i_h * M * W, p_lse + i_h * N
    p_s, p_out = p_s + i_h * N, p_out + i_h * M
    o_k = o_m.to(tl.int64)[:, None] * W + o_w[None, :]
    b_k = tl.load(p_k + o_k, mask=m_m[:, None] & m_w[None, :], other=0.0)  # [BM, BW]
    b_out = tl.zeros([BM], dtype=tl.float32)
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < N
        o_q = o_n.to(tl.int64)[:, None] * W + o_w[None, :]
        b_q = tl.load(p_q + o_q, mask=m_n[:, None] & m_w[None, :], other=0.0)  # [BN, BW]
        b_lse = tl.load(p_lse + o_n, mask=m_n, other=float("inf"))  # masked queries weigh exp(-inf) = 0
        b_weight = tl.load(p_s + o_n, mask=m_n, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BN, BM]
        b_out += tl.sum(tl.exp(b_s - b_lse[:, None]) * b_weight[:, None], axis=0)
    tl.store(p_out + o_m, b_out, mask=m_m)


@triton.jit
def _partner_fwd_kernel(
    p_q, p_k, p_lse, p_out, H, N, M, scale,
    W: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_w = tl.arange(0, BW)
    m_n, m_w = o_n < N, o_w < W
    o_q = o_n.to(tl.int64)[:, None] * W + o_w[None, :]
    b_best = tl.full([BN], float("-inf"), dtype=tl.float32)
    b_index = tl.zeros([BN], dtype=tl.int32)
    for m in range(0, M, BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < M
        o_k = o_m.to(tl.int64)[:, None] * W + o_w[None, :]
        b_sum = tl.zeros([BN, BM], dtype=tl.float32)
        for h in range(0, H):
            i_h = i_b * H + h
            b_q = tl.load(p_q + i_h * N * W + o_q, mask=m_n[:, None] & m_w[None, :], other=0.0)  # [BN, BW]
            b_k = tl.load(p_k + i_h * M * W + o_k, mask=m_m[:, None] & m_w[None, :], other=0.0)  # [BM, BW]
            b_lse = tl.load(p_lse + i_h * N + o_n, mask=m_n, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BN, BM]
            b_sum += tl.exp(b_s - b_lse[:, None])
        b_sum = tl.where(m_m[None, :], b_sum, float("-inf"))
        b_max, b_arg = tl.max(b_sum, axis=1, return_indices=True, return_indices_tie_break_left=True)
        m_better = b_max > b_best  # strict: an earlier column keeps a tie
        b_index = tl.where(m_better, m + b_arg, b_index)
        b_best = tl.where(m_better, b_max, b_best)
    tl.store(p_out + i_b * N + o_n, b_index.to(tl.int64), mask=m_n)


def log_sums(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Row log-sum-exp (B, H, N) fp32."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    constants = tile(q.dtype, width)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if lse.numel():
        grid = (triton.cdiv(queries, constants["BN"]), batch * heads)
        _log_sums_fwd_kernel[grid](q.contiguous(), k.contiguous(), lse, queries, keys, scale, **constants)
    return lse


def flow(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, s: torch.Tensor, scale: float) -> torch.Tensor:
    """A^T s, (B, H, M) fp32."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    constants = tile(q.dtype, width)
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    if out.numel():
        q, k, lse, s = q.contiguous(), k.contiguous(), lse.contiguous(), s.contiguous()
        grid = (triton.cdiv(keys, constants["BM"]), batch * heads)
        _flow_fwd_kernel[grid](q, k, lse, s, out, queries, keys, scale, **constants)
    return out


def partner(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float) -> torch.Tensor:
    """Best columns (B, N) int64."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    constants = tile(q.dtype, width, pairs=True)
    out = torch.empty(batch, queries, dtype=torch.int64, device=q.device)
    if out.numel():
        q, k, lse = q.contiguous(), k.contiguous(), lse.contiguous()
        grid = (triton.cdiv(queries, constants["BN"]), batch)
        _partner_fwd_kernel[grid](q, k, lse, out, heads, queries, keys, scale, **constants)
    return out
