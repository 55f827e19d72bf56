"""One module per catalogue entry: `from methods import tome`. Underscored packages are shared machinery."""
from methods._core.check import check
from methods._core.guess import guess
from methods._core.tune import load, tune
from methods._trained import weights
from methods._zoo import card, tiny

__all__ = ["card", "check", "guess", "load", "tiny", "tune", "weights"]
