"""Row gather and row scatter on a GPU."""

import torch
import triton
import triton.language as tl


def tile(channels: int) -> dict[str, int]:
    """Launch constants: 4,096 elements a program, in rows as wide as the channels allow."""
    width = min(1024, max(16, triton.next_power_of_2(channels)))
    return {"BR": 4096 // width, "BC": width, "num_warps": 8}


@triton.jit
def _gather_rows_fwd_kernel(p_x, p_index, p_out, N, K, C, rows, BR: tl.constexpr, BC: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_r = o_r < rows
    m_out = m_r[:, None] & (o_c < C)[None, :]
    b_row = (o_r // K) * N + tl.load(p_index + o_r, mask=m_r, other=0)
    b_x = tl.load(p_x + b_row[:, None] * C + o_c[None, :], mask=m_out, other=0.0)  # [BR, BC]
    tl.store(p_out + o_r[:, None] * C + o_c[None, :], b_x, mask=m_out)


@triton.jit
def _scatter_rows_fwd_kernel(p_rows, p_index, p_out, N, K, C, rows, BR: tl.constexpr, BC: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_r = o_r < rows
    m_x = m_r[:, None] & (o_c < C)[None, :]
    b_row = (o_r // K) * N + tl.load(p_index + o_r, mask=m_r, other=0)
    b_x = tl.load(p_rows + o_r[:, None] * C + o_c[None, :], mask=m_x, other=0.0)  # [BR, BC]
    tl.store(p_out + b_row[:, None] * C + o_c[None, :], b_x, mask=m_x)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, N, C), index (B, k) -> (B, k, C)."""
    out = torch.empty(*index.shape, x.shape[2], dtype=x.dtype, device=x.device)
    _launch(_gather_rows_fwd_kernel, x.contiguous(), index.contiguous(), out, x.shape[1])
    return out


def scatter_rows(base: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """base (B, N, C), index (B, k), rows (B, k, C) -> a new (B, N, C)."""
    out = base.clone(memory_format=torch.contiguous_format)
    _launch(_scatter_rows_fwd_kernel, rows.contiguous(), index.contiguous(), out, base.shape[1])
    return out


def _launch(kernel, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor, length: int) -> None:
    channels, constants = out.shape[2], tile(out.shape[2])
    if index.numel() and channels:
        grid = (triton.cdiv(index.numel(), constants["BR"]), triton.cdiv(channels, constants["BC"]))
        kernel[grid](source, index, out, length, index.shape[1], channels, index.numel(), **constants)
