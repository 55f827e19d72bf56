"""Stable Flow on the bundled two-stream model of emoji: its vital layers, and edits with keys and values injected there."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel_tools.measure.quality import nearest_emoji
from accel_tools.measure.tasks import TASKS, Task
from accel_tools.measure.tome_binding import families
from methods import stable_flow
from methods._zoo import load_judge

TASK = TASKS["mmdit"]
TAU = 0.4                               # vitality from which on a layer counts as vital
SAMPLES = 16                            # K, pictures of the search for vital layers; 64 in the paper


def pairs() -> list[tuple[str, str]]:
    """Prompts that differ in what stands before their noun: of each reference, and of its edit."""
    asked = families()
    return [(name, other) for name, others in asked.items() for other in others if " " in other and other != name][::12]


def draw(task: Task, pipe: Any, prompts: Sequence[str], seed: int) -> Tensor:
    """Pictures (n, 3, 32, 32) in [0, 1], all from the noise of `seed`."""
    pipe.set_progress_bar_config(disable=True)
    out = pipe(list(prompts), guidance_scale=task.guidance, num_inference_steps=task.steps, output_type="np",
               generator=[torch.Generator().manual_seed(seed) for _ in prompts], **dict(task.settings))
    return torch.as_tensor(out.images).movedim(-1, -3)


def vitalities(pipe: Any, samples: int = SAMPLES, steps: int = TASK.steps) -> list[float]:
    """Of each layer of the model, in the features of the judge."""
    judge = load_judge("emoji_judge")
    return stable_flow.vitality(pipe, lambda: TASK.sample(pipe, steps, TASK.prompts(samples)),
                                lambda images: judge.features(images * 2 - 1))


@torch.no_grad()
def scored(pipe: Any, asked: Sequence[tuple[str, str]]) -> list[float]:
    """Of edits drawn beside their references: share that is right, likeness to the reference, mean difference of pixels."""
    judge, found = load_judge("emoji_judge"), []
    for seed, pair in enumerate(asked):
        images = draw(TASK, pipe, pair, seed)
        a, b = judge.features(images * 2 - 1)
        right = nearest_emoji(images[1:], pair)[0] == pair[1]
        found.append((float(right), float(a @ b), float((images[1] - images[0]).abs().mean())))
    return [sum(column) / len(asked) for column in zip(*found, strict=True)]


def study(folder: Path) -> dict[str, Any]:
    """Edits with injection in no layer, in the vital ones, in the others and in all."""
    pipe, asked = TASK.load(), pairs()
    found = vitalities(pipe)
    vital, every = stable_flow.vital_layers(found, TAU), tuple(range(len(found)))
    rows = []
    for name, layers in (("no layer", ()), ("the vital layers", vital),
                         ("the other layers", tuple(i for i in every if i not in vital)), ("all layers", every)):
        with stable_flow.apply(pipe, stable_flow.Config(vital=layers)):
            rows.append([name, ", ".join(map(str, layers)), *scored(pipe, asked)])
    return {"model": TASK.model, "title": "Edits beside a reference",
            "note": f"{len(asked)} pairs of prompts such as \"{asked[0][0]}\" and \"{asked[0][1]}\", {TASK.steps} steps, both "
                    "pictures from one noise. Right: the edit is nearer to the emoji asked for than to that of the reference, "
                    "in the features of a judge; like the reference: cosine of both pictures there; moved: mean difference of "
                    "their pixels in [0, 1]. Vitality of layers 0 on, by the same features over "
                    f"{SAMPLES} pictures: {', '.join(f'{each:.3f}' for each in found)}; vital from {TAU} on.",
            "columns": ["Injected in", "Layers", "Right", "Like the reference", "Moved"], "rows": rows}
