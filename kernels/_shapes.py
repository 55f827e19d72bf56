"""Argument checks and row addressing that the ops share."""

import torch


def check_float(name: str, tensor: torch.Tensor, dims: str) -> None:
    """Refuses a tensor whose rank is not that of `dims`, e.g. "(B, N, C)", or whose dtype is not floating."""
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, allowed: {dims}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, allowed: a floating dtype")


def check_index(name: str, index: torch.Tensor, batch: int) -> None:
    """Refuses an index that is not int64 of shape (batch, any). Values are not read: that would wait for a GPU."""
    if index.dim() != 2 or index.shape[0] != batch:
        raise ValueError(f"{name} has shape {tuple(index.shape)}, allowed: ({batch}, any)")
    if index.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {index.dtype}, allowed: torch.int64")


def flat_rows(index: torch.Tensor, length: int) -> torch.Tensor:
    """(B, k) positions in sequences of `length` -> (B*k,) rows of the flattened (B*length, C) tensor."""
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * length).flatten()
