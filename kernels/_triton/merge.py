"""Segment means on a GPU: one program a segment, so sums need no atomics and keep position order."""

import torch
import triton
import triton.language as tl


def tile(channels: int) -> dict[str, int]:
    """Launch constants: a segment is summed in blocks as wide as the channels, up to 1,024."""
    width = min(1024, max(32, triton.next_power_of_2(channels)))
    return {"BC": width, "num_warps": max(1, width // 256)}


def whole(channels: int) -> dict[str, int]:
    """Launch constants of mlerp, which needs the norm of a token and so holds all of its channels."""
    width = max(32, triton.next_power_of_2(channels))
    return {"BC": width, "num_warps": min(16, max(1, width // 256))}


@triton.jit
def _merge_fwd_kernel(p_x, p_order, p_starts, p_out, segments, rows, C, BC: tl.constexpr):
    i_l = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    start = tl.load(p_starts + i_l)
    end = tl.load(p_starts + i_l + 1, mask=i_l + 1 < segments, other=rows)
    b_sum = tl.zeros([BC], dtype=tl.float32)
    for i in range(start, end):
        row = tl.load(p_order + i)
        b_sum += tl.load(p_x + row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_mean = b_sum / tl.maximum(end - start, 1).to(tl.float32)
    tl.store(p_out + i_l * C + o_c, b_mean.to(p_out.dtype.element_ty), mask=m_c)


def merge(x: torch.Tensor, order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Means (B, length, C) of x (B, N, C) over the runs of `order` that begin at `starts` (B*length,)."""
    batch, length, channels = x.shape
    out = torch.empty(batch, len(starts) // batch, channels, dtype=x.dtype, device=x.device)
    if out.numel():
        constants = tile(channels)
        grid = (len(starts), triton.cdiv(channels, constants["BC"]))
        _merge_fwd_kernel[grid](x.contiguous(), order, starts, out, len(starts), batch * length, channels, **constants)
    return out


@triton.jit
def _mlerp_fwd_kernel(p_x, p_order, p_starts, p_out, segments, rows, C, SHORT, BC: tl.constexpr):
    i_l = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    start = tl.load(p_starts + i_l)
    end = tl.load(p_starts + i_l + 1, mask=i_l + 1 < segments, other=rows)
    b_sum = tl.zeros([BC], dtype=tl.float32)
    longest = 0.0
    for i in range(start, end):
        row = tl.load(p_order + i)
        b_x = tl.load(p_x + row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_sum += b_x
        longest = tl.maximum(longest, tl.sum(b_x * b_x, axis=0))
    b_mean = b_sum / tl.maximum(end - start, 1).to(tl.float32)
    scale = tl.sqrt(longest) / tl.maximum(tl.sqrt(tl.sum(b_mean * b_mean, axis=0)), SHORT)
    tl.store(p_out + i_l * C + o_c, (b_mean * scale).to(p_out.dtype.element_ty), mask=m_c)


def mlerp(x: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, short: float) -> torch.Tensor:
    """Norm-preserving means (B, length, C) of x (B, N, C) over the runs of `order` that begin at `starts` (B*length,)."""
    batch, length, channels = x.shape
    out = torch.empty(batch, len(starts) // batch, channels, dtype=x.dtype, device=x.device)
    if out.numel():
        constants = whole(channels)
        _mlerp_fwd_kernel[(len(starts),)](
            x.contiguous(), order, starts, out, len(starts), batch * length, channels, short, **constants
        )
    return out
