"""The softmax attention map read as a weighted graph, without holding it.

A = softmax(scale * q k^T) for each head. `log_sums(q, k)[b, h, n]` = log of the row's sum of exponentials, from which the
others form A again, a tile at a time. `flow(q, k, lse, s)[b, h, m] = sum_n s[b, h, n] A[n, m]`, a step of weight along the
edges: A^T s. `partner(q, k, lse)[b, n]` = the column of the largest mean of A over heads, the lowest on equal means.

q (B, H, N, D), k (B, H, M, D) one floating dtype, M >= 1; scale None = 1/sqrt(D); D up to 256 in Triton | lse and s
(B, H, N) fp32, flow (B, H, M) fp32, partner (B, N) int64. Rows of q may be left out together with their lse; columns of k
may be left out of `partner`, whose lse then still is that of the whole row. Cost: 2*B*H*N*M*D FLOPs counted for each.
Deterministic. Not differentiable.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels._dispatch import pick
from accel_kernels._shapes import TILE, check_float


def log_sums(q: Tensor, k: Tensor, *, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Row log-sum-exp (B, H, N) fp32; ValueError on a wrong shape or dtype."""
    _check(q, k)
    return _log_sums(q, k, _scale(q, scale), impl)


def flow(q: Tensor, k: Tensor, lse: Tensor, s: Tensor, *, scale: float | None = None, impl: str = "auto") -> Tensor:
    """A^T s, (B, H, M) fp32; ValueError on a wrong shape or dtype."""
    _check(q, k, lse=lse, s=s)
    return _flow(q, k, lse, s, _scale(q, scale), impl)


def partner(q: Tensor, k: Tensor, lse: Tensor, *, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Best column of every row by the mean map over heads, (B, N) int64; ValueError on a wrong shape or dtype."""
    _check(q, k, lse=lse)
    return _partner(q, k, lse, _scale(q, scale), impl)


def _check(q: Tensor, k: Tensor, **rows: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        check_float(name, tensor, "(B, H, tokens, D)")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[2] < 1 or q.dtype != k.dtype:
        allowed = f"{(*q.shape[:2], 'M >= 1', q.shape[3])} of {q.dtype}"
        raise ValueError(f"k has shape {tuple(k.shape)} of {k.dtype}, allowed: {allowed}")
    for name, tensor in rows.items():
        if tensor.shape != q.shape[:3] or tensor.dtype != torch.float32:
            allowed = f"{tuple(q.shape[:3])} of torch.float32"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} of {tensor.dtype}, allowed: {allowed}")


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale


def _tiles(q: Tensor, k: Tensor, scale: float):
    """Yields (rows of q, logits (B, H, rows, M) fp32)."""
    step = max(16, TILE // (k.shape[0] * k.shape[1] * k.shape[2]))
    key = k.float().mT
    for n in range(0, q.shape[2], step):
        yield slice(n, n + step), (q[:, :, n : n + step].float() * scale) @ key


def reference_log_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Tiled eager torch."""
    out = q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for rows, logits in _tiles(q, k, scale):
            out[:, :, rows] = logits.logsumexp(-1)
    return out


def reference_flow(q: Tensor, k: Tensor, lse: Tensor, s: Tensor, scale: float) -> Tensor:
    """Tiled eager torch."""
    out = k.new_zeros(k.shape[:3], dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for rows, logits in _tiles(q, k, scale):
            out += (s[:, :, None, rows] @ (logits - lse[:, :, rows, None]).exp_())[:, :, 0]
    return out


def reference_partner(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Tiled eager torch."""
    out = torch.empty(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for rows, logits in _tiles(q, k, scale):
            out[:, rows] = (logits - lse[:, :, rows, None]).exp_().sum(1).argmax(-1)
    return out


@torch.library.custom_op("genaccel::attention_log_sums", mutates_args=())
def _log_sums(q: Tensor, k: Tensor, scale: float, impl: str) -> Tensor:
    if pick(impl, q, k) == "triton":
        from accel_kernels._triton import attention_graph as device

        return device.log_sums(q, k, scale)
    return reference_log_sums(q, k, scale)


@torch.library.custom_op("genaccel::attention_flow", mutates_args=())
def _flow(q: Tensor, k: Tensor, lse: Tensor, s: Tensor, scale: float, impl: str) -> Tensor:
    if pick(impl, q, k, lse, s) == "triton":
        from accel_kernels._triton import attention_graph as device

        return device.flow(q, k, lse, s, scale)
    return reference_flow(q, k, lse, s, scale)


@torch.library.custom_op("genaccel::attention_partner", mutates_args=())
def _partner(q: Tensor, k: Tensor, lse: Tensor, scale: float, impl: str) -> Tensor:
    if pick(impl, q, k, lse) == "triton":
        from accel_kernels._triton import attention_graph as device

        return device.partner(q, k, lse, scale)
    return reference_partner(q, k, lse, scale)


@_log_sums.register_fake
def _(q, k, scale, impl):
    return q.new_empty(q.shape[:3], dtype=torch.float32)


@_flow.register_fake
def _(q, k, lse, s, scale, impl):
    return k.new_empty(k.shape[:3], dtype=torch.float32)


@_partner.register_fake
def _(q, k, lse, scale, impl):
    return q.new_empty((q.shape[0], q.shape[2]), dtype=torch.int64)


@register_flop_formula(
    [torch.ops.genaccel.attention_log_sums, torch.ops.genaccel.attention_flow, torch.ops.genaccel.attention_partner]
)
def _flops(q, k, *args, **kwargs) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * q[3]
