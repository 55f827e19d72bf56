"""Whether a run that was measured is worth more than plain sampling in fewer steps, which anyone has for nothing."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from accel_tools.pages.measured import SCORES, Measured, Run

WORDS = {"better": "better than fewer steps", "trades": "trades with fewer steps", "loses": "loses to fewer steps"}
MARGIN = 0.5             # dB of PSNR within which two runs are at one distance from the plain images
REAL_MARGIN = 0.2        # of the distance to real images, which a few dozen images do not tell better


class Verdict(NamedTuple):
    word: str            # one of WORDS
    why: str


def verdict(found: Measured, run: Run) -> Verdict | None:
    """Of a method or a package, at its own speed on the line of fewer steps.

    The line is drawn through the measured runs, with the error of the images (the mean square behind a PSNR) linear in the
    speed-up between two of them. None where there is no such line, or no image to compare.
    """
    if run.kind not in ("method", "peer"):
        return None
    return against(run.arm, [each.arm for each in found.of("plain", "fewer")], found.noise)


def against(arm: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], noise: tuple[float, float] | None = None,
            ) -> Verdict | None:
    """`curve`: the plain run and those of fewer steps. `noise`: lowest and highest ratio of plain against plain."""
    speed, psnr = arm.get("speedup"), arm.get("psnr")
    fewer = sorted((each for each in curve[1:] if each.get("speedup") and each.get("psnr") is not None),
                   key=lambda each: each["speedup"])
    if speed is None or psnr is None or not fewer:
        return None
    if speed <= max(1.0, noise[1] if noise else 1.0):
        return Verdict("loses", f"at {speed:.2f}x it saves no time, within what plain runs differ by")
    error = _at(speed, [(1.0, 0.0), *((each["speedup"], _error(each["psnr"])) for each in fewer)])
    beyond = "" if speed <= fewer[-1]["speedup"] else ", beyond the fewest steps measured,"
    gap = psnr + 10 * math.log10(error) if math.isfinite(psnr) else math.inf
    word = "better" if gap > MARGIN else "loses" if gap < -MARGIN else "trades"
    why = f"at {speed:.2f}x{beyond} " + (
        f"its images are {abs(gap):.1f} dB {'closer to' if gap > 0 else 'farther from'} the plain ones than those of fewer "
        "steps" if word != "trades" else "its images are as far from the plain ones as those of fewer steps")
    if (other := _judged(arm, curve, speed)) and word == {"worse": "better", "finer": "loses"}[other[0]]:
        return Verdict("trades", f"{why}, but {other[1]}")
    return Verdict(word, why)


def _error(psnr: float) -> float:
    return 10 ** (-psnr / 10)


def _at(speed: float, line: Sequence[tuple[float, float]]) -> float:
    """The height of a line at `speed`; beyond its last point, of that point."""
    for (x0, y0), (x1, y1) in pairwise(line):
        if speed <= x1:
            return y0 + (y1 - y0) * (speed - x0) / (x1 - x0)
    return line[-1][1]


def _judged(arm: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], speed: float) -> tuple[str, str] | None:
    """Whether a judge says that images are clearly worse, or finer, than those of fewer steps at that speed."""
    for key, sign, words in (*((score, 1, name.lower()) for score, name in SCORES.items()),
                             ("frechet", -1, "distance to real images")):
        line = sorted((each.get("speedup", 1.0) if i else 1.0, each[key]) for i, each in enumerate(curve) if key in each)
        if key not in arm or not line:
            continue
        there = _at(speed, line)
        gap = sign * (arm[key] - there)
        if abs(gap) > (REAL_MARGIN * there if sign < 0 else _chance(there, arm.get("n", 1))):
            return ("finer" if gap > 0 else "worse"), f"{words} is {arm[key]:.3g} against {there:.3g}"
    return None


def _chance(share: float, n: int) -> float:
    """What two shares of n images each differ by chance: two standard errors, and never less than two images."""
    return max(2 / n, 2 * math.sqrt(2 * share * (1 - share) / n))
