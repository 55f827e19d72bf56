"""Softmax attention that also reports how much attention every key receives.

`out = softmax(scale * q k^T) v`; `mass[b, m]` = mean over heads of the column sum over queries of that softmax, so that
`mass[b]` sums to N. Token-wise caches rank tokens by it; a fused attention never shows the map it is read from.

q (B, H, N, D), k and v (B, H, M, D) one floating dtype, M >= 1; scale None = 1/sqrt(D); D up to 256 in Triton | out
(B, H, N, D) in q's dtype, mass (B, M) fp32. Cost: 4*B*H*N*M*D FLOPs counted (the Triton kernels form q k^T twice, so
they execute 6*B*H*N*M*D); the map exists one tile of queries at a time. Deterministic. Not differentiable.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels._dispatch import pick
from accel_kernels._shapes import TILE, check_float


def attention_mass(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(out, mass) as in the module docstring; ValueError on a wrong shape or dtype."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor, "(B, H, tokens, D)")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[2] < 1 or q.dtype != k.dtype:
        allowed = f"{(*q.shape[:2], 'M >= 1', q.shape[3])} of {q.dtype}"
        raise ValueError(f"k has shape {tuple(k.shape)} of {k.dtype}, allowed: {allowed}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v has shape {tuple(v.shape)} of {v.dtype}, allowed: {tuple(k.shape)} of {k.dtype}")
    return _attention_mass(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, impl)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Tiled eager torch in fp32. Heads with short sequences share a tile."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    q, k, v = (t.reshape(batch * heads, -1, width) for t in (q, k, v))
    out = torch.empty_like(q)
    mass = q.new_zeros((batch * heads, keys), dtype=torch.float32)
    step = max(16, TILE // keys)
    group = max(1, step // max(1, queries))
    with torch.autocast(q.device.type, enabled=False):
        for h in range(0, batch * heads, group):
            key, value = k[h : h + group].float().transpose(1, 2), v[h : h + group].float()
            for n in range(0, queries, step):
                weight = torch.bmm(q[h : h + group, n : n + step].float() * scale, key).softmax(dim=-1)
                out[h : h + group, n : n + step] = torch.bmm(weight, value)
                mass[h : h + group] += weight.sum(dim=1)
    return out.view(batch, heads, queries, width), mass.view(batch, heads, keys).mean(dim=1)


@torch.library.custom_op("genaccel::attention_mass", mutates_args=())
def _attention_mass(q: Tensor, k: Tensor, v: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    if pick(impl, q, k, v) == "triton":
        from accel_kernels._triton import attention_mass as device

        return device.attention_mass(q, k, v, scale)
    return reference(q, k, v, scale)


@_attention_mass.register_fake
def _(q, k, v, scale, impl):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], k.shape[2]), dtype=torch.float32)


@register_flop_formula(torch.ops.genaccel.attention_mass)
def _flops(q, k, *args, **kwargs) -> int:
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]
