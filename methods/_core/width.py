"""Narrower versions of the layers of a transformer block: some of the heads, some groups of the MLP's channels.

They are made of selected weights, through which gradients reach the full layer; the layer itself stays as it is.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def twin(module: nn.Module, **children: nn.Module) -> nn.Module:
    """`module` with other `children`; all else is shared."""
    made = copy.copy(module)
    made._modules = module._modules | children
    return made


def narrow(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """`linear` with only the outputs `rows` and only the inputs `columns`, indices; the bias of a kept output stays."""
    weight, bias = linear.weight, linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    made = copy.copy(linear)
    made._parameters = {"weight": weight, "bias": bias}
    made.out_features, made.in_features = weight.shape
    return made


def members(groups: Sequence[int], size: int, device: torch.device) -> Tensor:
    """Indices of all members of `groups` of `size` neighbours each."""
    return (torch.tensor(groups, device=device)[:, None] * size + torch.arange(size, device=device)).flatten()


def heads(attn: nn.Module, active: Sequence[int]) -> nn.Module:
    """The attention of diffusers with only its heads `active`; what the others added to the output is missing."""
    rows = members(active, attn.to_q.out_features // attn.heads, attn.to_q.weight.device)
    out = twin(attn.to_out, **{"0": narrow(attn.to_out[0], columns=rows)})
    made = twin(attn, to_q=narrow(attn.to_q, rows), to_k=narrow(attn.to_k, rows), to_v=narrow(attn.to_v, rows), to_out=out)
    made.heads = len(active)
    return made


def channels(ff: nn.Module, active: Sequence[int], groups: int) -> nn.Module:
    """The MLP of diffusers with only the groups `active` of its hidden channels, of `groups` equal ones."""
    down = ff.net[-1]
    kept = members(active, down.in_features // groups, down.weight.device)
    first = twin(ff.net[0], proj=narrow(ff.net[0].proj, kept))
    return twin(ff, net=twin(ff.net, **{"0": first, str(len(ff.net) - 1): narrow(down, columns=kept)}))


class Heads(nn.Module):
    """Attention of which the heads `open` count: None for all, some of them, or gates (B, H) to multiply each by."""

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.inner = attn
        self.open: tuple[int, ...] | Tensor | None = None
        attn.to_out[0].register_forward_pre_hook(self.scale)

    def scale(self, _: nn.Module, args: tuple[Tensor]) -> Tensor:
        return scaled(args[0], self.open)

    def forward(self, *args, **kwargs) -> Tensor:
        attn = heads(self.inner, self.open) if isinstance(self.open, tuple) else self.inner
        return attn(*args, **kwargs)


class Channels(nn.Module):
    """An MLP of which the groups `open` of its hidden channels count: None for all, some, or gates (B, groups)."""

    def __init__(self, ff: nn.Module, groups: int):
        super().__init__()
        self.inner, self.groups = ff, groups
        self.open: tuple[int, ...] | Tensor | None = None
        ff.net[0].proj.register_forward_hook(self.scale)             # before the activation, which leaves 0 at 0

    def scale(self, _: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return scaled(out, self.open)

    def forward(self, x: Tensor) -> Tensor:
        ff = channels(self.inner, self.open, self.groups) if isinstance(self.open, tuple) else self.inner
        return ff(x)


def scaled(x: Tensor, gates: tuple[int, ...] | Tensor | None) -> Tensor:
    """x (B, N, C), its C channels in H equal groups, each times its gate (B, H), if there are gates."""
    if not isinstance(gates, Tensor):
        return x
    return x * gates.repeat_interleave(x.shape[-1] // gates.shape[-1], dim=-1)[:, None].to(x)
