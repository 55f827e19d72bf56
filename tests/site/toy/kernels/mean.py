"""Mean of *everything*: `mean(x)[b]` = a*b*c.

x (B, N) | out (B,).
"""


def mean(x: list, *, impl: str = "auto") -> list:
    """The mean (B,) of `x`."""
    return x


def _private():
    pass
