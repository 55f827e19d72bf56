"""Several processes that work on one model: who has which part, how parts come together, and how many bytes that moved."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """Item i of x (N, ...) goes to process i; what comes back stands in the order of the processes. So do gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, out = group, torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad.contiguous(), ctx.group), None


class _Copies(torch.autograd.Function):
    """x of every process (N, ...). The gradient of one's own is the sum of what comes back for it from all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, size: int) -> Tensor:
        ctx.group, out = group, x.new_empty((size, *x.shape))
        dist.all_gather(list(out.unbind()), x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(grad.contiguous(), ctx.group).sum(0), None, None


class Processes:
    """The processes of a group, seen from one of them. Every process must make the same calls in the same order.

    Args:
        group: of torch.distributed; None is the default group, or this process alone where there is none.
        name: of the method, for its errors.
    """

    def __init__(self, group: Any, name: str):
        self.alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.group, self.name = group, name
        self.size = 1 if self.alone else dist.get_world_size(group)
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.sent = 0                       # bytes that this process gave to others

    def part(self, x: Tensor, dim: int) -> Tensor:
        """What this process has of `x`, cut along `dim` into parts that differ by at most one."""
        return x.tensor_split(self.size, dim)[self.rank]

    def gather(self, part: Tensor, dim: int, length: int) -> Tensor:
        """The whole, of `length` along `dim`, from the `part` of every process.

        Raises:
            RuntimeError: another process ended or does not answer.
        """
        if self.size == 1:
            return part
        longest = -(-length // self.size)                                  # shorter parts are filled up, and cut again
        mine = part.new_zeros((*part.shape[:dim], longest, *part.shape[dim + 1:]))
        mine.narrow(dim, 0, part.shape[dim]).copy_(part)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together():
            dist.all_gather(parts, mine, group=self.group)
        self.sent += mine.numel() * mine.element_size() * (self.size - 1)
        return torch.cat([each.narrow(dim, 0, length // self.size + (rank < length % self.size))
                          for rank, each in enumerate(parts)], dim)

    def padded(self, x: Tensor, dim: int) -> Tensor:
        """`x`, filled up with zeros at the end of `dim` to a length that the processes share evenly."""
        return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, -x.shape[dim] % self.size))

    def switch(self, part: Tensor, whole: int, cut: int, length: int) -> Tensor:
        """The dimension `cut` whole, of this `length`, and `whole` cut into even, padded parts, in place of the other way
        round; by one all-to-all, through which gradients flow back.

        Raises:
            RuntimeError: another process ended or does not answer.
        """
        mine = torch.stack(self.padded(part, whole).chunk(self.size, whole))
        with self._together():
            theirs = _Exchange.apply(mine, self.group)
        self.sent += mine.numel() * mine.element_size() * (self.size - 1) // self.size
        return torch.cat(theirs.unbind(), cut).narrow(cut, 0, length)

    def join(self, part: Tensor, dim: int, length: int) -> Tensor:
        """The whole, of this `length`, from even, padded parts; gradients flow back from every process.

        Raises:
            RuntimeError: another process ended or does not answer.
        """
        with self._together():
            parts = _Copies.apply(part.contiguous(), self.group, self.size)
        self.sent += part.numel() * part.element_size() * (self.size - 1)
        return torch.cat(parts.unbind(), dim).narrow(dim, 0, length)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise RuntimeError(f"{self.name}: process {self.rank} of {self.size} waits for another one that has ended or does "
                               f"not answer; start all of them again ({first})") from None
