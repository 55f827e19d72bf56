"""Al_pha* - Alpha

Jane Doe, Collective, CVPR 2023. arXiv:2303.00001. Code: doe/alpha

Idea: everything is
merged.

Map
    Eq. 1     the mean of all tokens          merge
    Sec. 3    merge, and undo it              _State.undo, methods._core.patch
              in every block

Departures
    One sentence that runs
    over two lines.
    Another with `code | pipe`.

Example
    >>> from methods import alpha
    >>> alpha.merge(
    ...     2)
    2
"""
from dataclasses import dataclass

from accel_kernels import mean


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.5            # r, Eq. 1
    name: str | None = None       # a pipe | and *stars*,
    # on two lines

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} outside [0, 1]")  # not about a field


def merge(x):
    """``` a fence in a docstring"""
    return mean.mean(x)


class _State:
    def undo(self):
        pass


def apply(target, config: Config = Config()):
    """Put it on."""
