"""What a model is told as its time, from what the scheduler has: timestep `t`, `sigma` and the number of training steps."""
from __future__ import annotations


def scheduler_time(t: float, sigma: float, train: int) -> float:
    return t


def share(t: float, sigma: float, train: int) -> float:
    return t / train


def share_done(t: float, sigma: float, train: int) -> float:
    return 1 - t / train


def sigma_ratio(t: float, sigma: float, train: int) -> float:
    return sigma / (sigma + 1)
