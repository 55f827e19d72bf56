"""Softmax attention through a few agent tokens, at a cost linear in the tokens.

`out = softmax(sharp * q a^T) softmax(scale * a k^T) v + shortcut * v`: the agents a read all keys, then every query reads
the agents. No map of more than agents x tokens exists, and that one a tile at a time.

q, k, v (B, H, N, D), a (B, H, n, D) one floating dtype, n >= 1 and N >= 1; D up to 256 in Triton | out (B, H, N, D) in that
dtype. Cost: 8*B*H*n*N*D FLOPs. Deterministic. Not differentiable.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from accel_kernels._dispatch import pick
from accel_kernels._shapes import check_float


def agent_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, scale: float, sharp: float, shortcut: float = 0.0, *, impl: str = "auto"
) -> Tensor:
    """(B, H, N, D) as in the module docstring; ValueError on a wrong shape or dtype."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("a", a)):
        check_float(name, tensor, "(B, H, tokens, D)")
        allowed = (*q.shape[:2], q.shape[2] if name != "a" else "n", q.shape[3])
        if tensor.shape[2] < 1 or tensor.dtype != q.dtype or any(
            want not in ("n", got) for got, want in zip(tensor.shape, allowed, strict=True)
        ):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} of {tensor.dtype}, allowed: {allowed} of {q.dtype}")
    return _agent_attention(q, k, v, a, scale, sharp, shortcut, impl)


def reference(q: Tensor, k: Tensor, v: Tensor, a: Tensor, scale: float, sharp: float, shortcut: float) -> Tensor:
    """Two of torch's own fused attentions."""
    gathered = F.scaled_dot_product_attention(a, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, a, gathered, scale=sharp).add_(v, alpha=shortcut)


@torch.library.custom_op("genaccel::agent_attention", mutates_args=())
def _agent_attention(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, scale: float, sharp: float, shortcut: float, impl: str
) -> Tensor:
    if pick(impl, q, k, v, a) == "triton":
        from accel_kernels._triton import agent_attention as device

        return device.agent_attention(q, k, v, a, scale, sharp, shortcut)
    return reference(q, k, v, a, scale, sharp, shortcut).contiguous()


@_agent_attention.register_fake
def _(q, k, v, a, scale, sharp, shortcut, impl):
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.genaccel.agent_attention)
def _flops(q, k, v, a, *args, **kwargs) -> int:
    return 8 * q[0] * q[1] * a[2] * q[2] * q[3]
