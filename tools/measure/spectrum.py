"""Forecasts beside plain reuse at equal compute: from which order, and over which distance, they harm on each bundled model."""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from accel_tools.catalog import load
from accel_tools.measure.arms import Arm
from accel_tools.measure.quality import psnr
from accel_tools.measure.tasks import TASKS, Task, bundled

INTERVALS = (2, 3, 4, 6)
FULL = 2                                # full steps at the start, of all alike
IMAGES = 12


@cache
def before() -> str:
    """The method that this one builds on."""
    (slug,) = load().entries["spectrum"].builds_on
    return slug


def arms(task: Task, interval: int) -> dict[str, Arm]:
    """What is compared, this method and the one it builds on: all run the blocks in the same steps."""
    series = {"interval": interval, "first_enhance": FULL}
    fit = {"window": float(interval), "growth": 0.0, "warmup": FULL}
    orders = {f"order {order}" if order else "reuse": Arm(task.steps, before(), {**series, "max_order": order})
              for order in range(4)}
    mixed = Arm(task.steps, "spectrum", {**fit, "mix": 0.5})
    return orders | {"Spectrum": Arm(task.steps, "spectrum", fit), "Spectrum, half a line": mixed}


@torch.no_grad()
def study(folder: Path, images: int = IMAGES) -> dict[str, Any]:
    """PSNR to the plain images, by model and interval."""
    rows = []
    for task in (TASKS[name] for name in bundled() if "patch" in TASKS[name].kinds):
        pipe = task.load()
        prompts = task.prompts(images)
        plain = task.sample(pipe, task.steps, prompts)
        for interval in INTERVALS:
            found = []
            for arm in arms(task, interval).values():
                try:
                    with arm.applied(pipe):
                        found.append(psnr(task.sample(pipe, task.steps, prompts), plain))
                except ValueError:                                  # TaylorSeer on a UNet
                    found.append(None)
            rows.append([task.model, interval, *found])
    names = list(arms(TASKS[bundled()[0]], 2))
    return {"model": "all", "title": "Forecasts beside reuse",
            "note": f"PSNR in dB to the plain images, {images} of each model, guided as in the bench. The blocks run "
                    f"in the first {FULL} steps and then at that interval, the same steps for all; between, module outputs are "
                    "reused or continued by TaylorSeer's polynomial of an order, or the state behind the last block by "
                    "Spectrum. Where a number is below the one to its left, that order harms at that distance.",
            "columns": ["Model", "Interval", *names], "rows": rows}
