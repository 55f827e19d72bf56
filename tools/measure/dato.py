"""DaTo on the bundled UNet of emoji: plans searched for it, beside the released one and beside fewer steps."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from accel_tools.measure.arms import Arm
from accel_tools.measure.macs import count_macs
from accel_tools.measure.quality import psnr
from accel_tools.measure.records import code_hash_of
from accel_tools.measure.tasks import TASKS
from methods import dato
from methods._zoo import card

SLUG, TASK = "dato", TASKS["unet"]


def study(folder: Path, *, population: int = 15, generations: int = 30, images: int = 6, held_out: int = 24,
                fewer: Sequence[int] = (15, 10, 7, 5, 4, 3)) -> dict[str, Any]:
    """The plans that NSGA-II finds for the UNet: mean squared error to the unaccelerated images against multiply-accumulates.

    A search that was stopped goes on from the plans it had judged, which lie in `folder`.
    """
    pipe, steps = TASK.load(), TASK.steps
    plain = Arm(steps)

    def draw(arm: Arm, seed: int, n: int) -> Tensor:
        with arm.applied(pipe):
            return TASK.sample(pipe, arm.steps, TASK.prompts(n, seed * n), seed=seed)

    def macs_of(arm: Arm) -> int:
        with arm.applied(pipe):
            return count_macs(lambda: TASK.sample(pipe, arm.steps, TASK.prompts(1)))

    def planned(plan: Sequence[int]) -> Arm:
        return Arm(steps, SLUG, {"plan": tuple(plan)})

    def whole(plan: tuple[int, ...]) -> tuple[int, ...]:
        """With the entry behind the last step, which only samplers with one more call read."""
        return (*plan, 1)

    unaccelerated = macs_of(plain)
    constant = [macs_of(planned((stage,))) / unaccelerated for stage in (0, 1, 2)]     # the first step is always full
    first = constant[2] / steps
    call = [(share - first) / (steps - 1) for share in constant]
    goal, seen = draw(plain, 0, images), count(1)

    def cost(plan: tuple[int, ...]) -> tuple[float, float]:
        error = float((draw(planned(whole(plan)), 0, images) - goal).square().mean())
        share = first + sum(call[stage] for stage in plan)
        print(f"plan {next(seen)} of at most {population * generations}: {written(whole(plan))}  "
              f"error {error:.5f}  MACs {share:.3f}", flush=True)
        return error, share

    code = code_hash_of(SLUG).removeprefix("sha256:")
    name = f"{SLUG}-{TASK.model}-{card(TASK.model)['sha256'][:8]}-{code[:8]}-{population}-{images}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    found = dato.search(cost, steps - 1, population=population, generations=generations, initial=any_plan,
                        journal=folder / name)
    others = draw(plain, 1, held_out)

    def row(what: str, arm: Arm) -> list[Any]:
        return [what, unaccelerated / macs_of(arm), psnr(draw(arm, 0, images), goal), psnr(draw(arm, 1, held_out), others)]

    rows = [row(written(whole(plan)), planned(whole(plan))) for plan, _ in found]
    rows.append(row(f"released plan, {written(dato.PLAN)}", planned(dato.PLAN)))
    rows += [row(f"fewer steps, {n}", Arm(n)) for n in fewer]
    return {
        "title": "Plans searched for the bundled UNet",
        "note": f"NSGA-II, {generations} generations of {population} plans, from plans with any share of full steps, for least "
                f"error to the unaccelerated images and least arithmetic, on {images} images; the last column is of "
                f"{held_out} images with other prompts and noise, which the search did not see. A plan has a digit for each of "
                f"steps 1 to {steps - 1}: 2 computes everything, 1 the shallowest depth, 0 nothing; step 0 is whole, and the "
                "last digit is for samplers with one more call. The released plan was found for another model and 50 steps.",
        "columns": ["Plan", "Speed-up its MACs allow", "PSNR where searched (dB)", "PSNR elsewhere (dB)"], "rows": rows}


def any_plan(length: int, random: np.random.Generator) -> np.ndarray:
    """A plan to start from, with any share of full steps: so few steps bear none as sparse as those for 50."""
    return np.where(random.random(length) < random.random(), 2, random.integers(0, 2, length))


def written(plan: Sequence[int]) -> str:
    return "".join(map(str, plan))
