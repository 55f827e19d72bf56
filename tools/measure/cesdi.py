"""FISEdit on the bundled UNet of emoji: what an edit costs beside drawing again, and what moves outside its region."""
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from accel_tools.measure.arms import Arm
from accel_tools.measure.macs import count_macs
from accel_tools.measure.quality import psnr
from accel_tools.measure.stable_flow import draw, pairs
from accel_tools.measure.tasks import TASKS
from accel_tools.measure.timing import compare, interleave

TASK = TASKS["unet"]
ROUNDS = 5
SIZES = {"conv_size": 256, "token_size": 256}        # of sparse layers: the model draws 32 x 32 pixels, not 64 x 64 latents
MASK = [[x >= 16 for x in range(32)] for _ in range(32)]                                    # the right half is edited


def study(folder: Path) -> dict[str, Any]:
    """Pairs of a picture and its edit: plain, with a region that is found, and with one that is given."""
    pipe, asked = TASK.load(), pairs()
    arms = {"drawn again": Arm(TASK.steps), "region found": Arm(TASK.steps, "cesdi", SIZES),
            "right half given": Arm(TASK.steps, "cesdi", SIZES | {"mask": MASK})}
    around = {name: partial(arm.applied, pipe) for name, arm in arms.items()}
    seconds = interleave({name: partial(draw, TASK, pipe, asked[0], 0) for name in arms}, ROUNDS, around)
    outside = ~torch.tensor(MASK)
    rows, plain = [], 0
    for name, arm in arms.items():
        with arm.applied(pipe):
            macs = count_macs(partial(draw, TASK, pipe, asked[0], 0))
            found = [draw(TASK, pipe, pair, seed) for seed, pair in enumerate(asked)]
        plain = plain or macs
        rows.append([name, (2 * macs - plain) / plain, compare(seconds["drawn again"], seconds[name])["speedup"],
                     psnr(torch.stack([a for a, _ in found])[..., outside], torch.stack([b for _, b in found])[..., outside]),
                     sum(float((b - a).abs()[..., ~outside].mean()) for a, b in found) / len(found)])
    return {"model": TASK.model, "title": "Edits beside their original",
            "note": f"{len(asked)} pairs of prompts such as \"{asked[0][0]}\" and \"{asked[0][1]}\" from one noise, "
                    f"{TASK.steps} steps, both pictures in one batch. Work of the edit: of that of a picture, when its "
                    "original is paid in full. PSNR between both pictures in the left half, which the last row leaves alone; "
                    "moved: mean difference of pixels in [0, 1] in the right one.",
            "columns": ["Edit", "Work of the edit", "Speed-up of the pair", "PSNR on the left (dB)", "Moved on the right"],
            "rows": rows}
