"""Several processes that work on one model: who has which part, how parts come together, and how many bytes that moved."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise RuntimeError(f"{self.name}: process {self.rank} of {self.size} waits for another one that has ended or does "
                               f"not answer; start all of them again ({first})") from None
