"""Wall-clock times that can be compared on a noisy machine: calls are interleaved and only ratios within a round count."""
from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from typing import Any

import torch


@torch.no_grad()
def interleave(calls: dict[str, Callable[[], Any]], rounds: int,
               around: dict[str, Callable[[], AbstractContextManager]] | None = None) -> dict[str, list[float]]:
    """Seconds of every call in each of `rounds` rounds, after one unmeasured round; every other round runs backwards.

    `around[name]()` is entered, untimed, for each call of that name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            with (around or {}).get(name, nullcontext)():
                start = time.perf_counter()
                calls[name]()
                elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed)
    return seconds


def compare(plain: list[float], other: list[float]) -> dict[str, Any]:
    """Latency of `other` and its speed-up over `plain`, paired by round: medians, each with its quartiles as spread.

    The comparison of two plain series, A/A, is what a speed-up has to exceed.
    """
    ratios = [a / b for a, b in zip(plain, other, strict=True)]
    return {"latency_s": median(other), "latency_spread": _quartiles(other),
            "speedup": median(ratios), "speedup_spread": _quartiles(ratios)}


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return [low, high]


def breakdown(call: Callable[[], Any], top: int = 8) -> list[dict[str, Any]]:
    """The ops that take the most CPU time of their own in one call: where a speed-up below its MAC bound went."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    ops = sorted(profiler.key_averages(), key=lambda op: -op.self_cpu_time_total)[:top]
    return [{"op": op.key, "calls": op.count, "seconds": op.self_cpu_time_total / 1e6} for op in ops]
