"""Cosine match on a GPU: row norms, then a GEMM whose scores never leave the program that computed them."""

import torch
import triton
import triton.language as tl

PROGRAMS = 256  # wanted in flight; fewer source tiles than this split the destinations


def tile(dtype: torch.dtype) -> dict[str, int]:
    """Launch constants: the largest tile tried that fits in registers on every target of tools/compile_kernels.py."""
    if dtype == torch.float32:
        return {"BS": 64, "BD": 64, "BC": 16, "num_warps": 8, "num_stages": 2}
    return {"BS": 128, "BD": 64, "BC": 32, "num_warps": 8, "num_stages": 3}


def launch(batch: int, sources: int, targets: int, constants: dict[str, int]) -> tuple[tuple[int, int, int], int]:
    """The launch grid (source tiles, splits of the destinations, batch), and how many destinations a split has."""
    tiles, columns = triton.cdiv(sources, constants["BS"]), triton.cdiv(targets, constants["BD"])
    splits = min(columns, triton.cdiv(PROGRAMS, max(1, tiles * batch)))
    span = triton.cdiv(columns, splits) * constants["BD"]
    return (tiles, triton.cdiv(targets, span), batch), span


@triton.jit
def _row_norm_fwd_kernel(p_x, p_norm, rows, C, BR: tl.constexpr, BC: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < rows
    b_sum = tl.zeros([BR], dtype=tl.float32)
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        m_x = m_r[:, None] & (o_c < C)[None, :]
        b_x = tl.load(p_x + o_r[:, None] * C + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)  # [BR, BC]
        b_sum += tl.sum(b_x * b_x, axis=1)
    tl.store(p_norm + o_r, tl.maximum(tl.sqrt(b_sum), 1.1754943508222875e-38), mask=m_r)  # the smallest normal number


@triton.jit
def _cosine_match_fwd_kernel(
    p_x, p_norm, p_src, p_dst, p_score, p_index,
    N, C, S, D, d_span,  # tokens, channels, sources, destinations, destinations per split
    BS: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_split, splits = tl.program_id(1), tl.num_programs(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    m_s = o_s < S
    b_src = i_b * N + tl.load(p_src + i_b * S + o_s, mask=m_s, other=0)
    b_best = tl.full([BS], float("-inf"), dtype=tl.float32)
    b_index = tl.zeros([BS], dtype=tl.int32)
    for d in range(i_split * d_span, tl.minimum(D, (i_split + 1) * d_span), BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        b_dst = i_b * N + tl.load(p_dst + i_b * D + o_d, mask=m_d, other=0)
        b_dot = tl.zeros([BS, BD], dtype=tl.float32)
        for c in range(0, C, BC):
            o_c = c + tl.arange(0, BC)
            m_c = o_c < C
            b_q = tl.load(p_x + b_src[:, None] * C + o_c[None, :], mask=m_s[:, None] & m_c[None, :], other=0.0)
            b_k = tl.load(p_x + b_dst[None, :] * C + o_c[:, None], mask=m_d[None, :] & m_c[:, None], other=0.0)
            b_dot = tl.dot(b_q, b_k, b_dot, input_precision="ieee")
        b_dot = b_dot / tl.load(p_norm + b_dst, mask=m_d, other=1.0)[None, :]
        b_dot = tl.where(m_d[None, :], b_dot, float("-inf"))
        b_max, b_arg = tl.max(b_dot, axis=1, return_indices=True, return_indices_tie_break_left=True)
        m_better = b_max > b_best  # strict: an earlier column keeps a tie
        b_index = tl.where(m_better, d + b_arg, b_index)
        b_best = tl.where(m_better, b_max, b_best)
    b_best = b_best / tl.load(p_norm + b_src, mask=m_s, other=1.0)
    o_out = (i_b * splits + i_split) * S + o_s
    tl.store(p_score + o_out, b_best, mask=m_s)
    tl.store(p_index + o_out, b_index.to(tl.int64), mask=m_s)


def row_norm(x: torch.Tensor) -> torch.Tensor:
    """Norms (B, N) of the rows of x (B, N, C), at least the smallest normal number."""
    (batch, length, channels), rows = x.shape, x.shape[0] * x.shape[1]
    norm = torch.empty(batch, length, dtype=torch.float32, device=x.device)
    _row_norm_fwd_kernel[(triton.cdiv(rows, 16),)](x, norm, rows, channels, BR=16, BC=128, num_warps=4)
    return norm


def cosine_match(x: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and index (B, S) for x (B, N, C), src (B, S), dst (B, D)."""
    x, src, dst = x.contiguous(), src.contiguous(), dst.contiguous()
    (batch, length, channels), sources, targets = x.shape, src.shape[1], dst.shape[1]
    constants = tile(x.dtype)
    norm = row_norm(x)
    grid, span = launch(batch, sources, targets, constants)
    score = torch.empty(batch, grid[1], sources, dtype=torch.float32, device=x.device)
    index = torch.empty(batch, grid[1], sources, dtype=torch.int64, device=x.device)
    if score.numel():
        _cosine_match_fwd_kernel[grid](
            x, norm, src, dst, score, index, length, channels, sources, targets, span, **constants
        )
    best, split = score.max(dim=1)  # on a tie the first split, which holds the lower columns
    return best, index.gather(1, split[:, None])[:, 0]
