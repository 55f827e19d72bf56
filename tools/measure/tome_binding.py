"""ToMe's binding of attributes on the bundled UNet of emoji: whether what is shown has the attribute that was asked for."""
from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from time import perf_counter
from typing import Any

from accel_tools.measure.arms import Arm
from accel_tools.measure.quality import nearest_emoji
from accel_tools.measure.tasks import TASKS
from methods import tome_binding
from methods._zoo import card

SLUG, TASK = "tome_binding", TASKS["unet"]


def families() -> dict[str, list[str]]:
    """Names of emoji of two words and more -> the names that end in the same noun, themselves among them."""
    ending = defaultdict(list)
    for name in card("emoji_judge")["names"]:
        ending[name.split()[-1]].append(name)
    return {name: others for others in ending.values() if len(others) > 1 for name in others if " " in name}


def binding_arms(phrase: str, tokenizer: Any, tokens: int) -> dict[str, Arm]:
    """The arms of one phrase: its last word is the noun, the others are its modifiers. `tokens` places in the maps."""
    positions, start = [], 1
    for word in phrase.split():
        pieces = len(tokenizer.tokenize(word))
        positions.append(tuple(range(start, start + pieces)))
        start += pieces
    modifiers = tuple(place for word in positions[:-1] for place in word)
    objects = {"objects": ((positions[-1], modifiers),), "length": start - 1}
    # The official thresholds are for 32 x 32 maps: the same shares of the entropy of an even map of this model.
    thresholds = tuple(2 * ((h / 2 - 2) * tome_binding.uniform_entropy(tokens, 1) / tome_binding.uniform_entropy(1024, 1) + 2)
                       for h in tome_binding.Config().thresholds)
    merged = objects | {"token_steps": 0, "attention_steps": 0}
    tuned = objects | {"anchors": (phrase,), "token_rate": 10.0, "thresholds": thresholds, "rate": 0.3}
    return {"Unedited prompt": Arm(TASK.steps), "Tokens merged": Arm(TASK.steps, SLUG, merged),
            "Tokens merged, tuned and refined": Arm(TASK.steps, SLUG, tuned)}


def study(folder: Path, *, samples: int = 2) -> dict[str, Any]:
    """Whether the emoji shown has the asked attribute, among those that share its noun."""
    pipe, asked = TASK.load(), families()
    chance = sum(1 / len(family) for family in asked.values()) / len(asked)
    right: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for number, (phrase, family) in enumerate(asked.items()):
        for name, arm in binding_arms(phrase, pipe.tokenizer, tokens=256).items():
            start = perf_counter()
            with arm.applied(pipe):
                images = TASK.sample(pipe, arm.steps, [phrase] * samples, seed=number)
            seconds[name] += perf_counter() - start
            right[name].append(sum(found == phrase for found in nearest_emoji(images, family)) / samples)
        print(f"{number + 1} of {len(asked)}: {phrase}: " + ", ".join(f"{name} {sum(found) / len(found):.3f}"
                                                                  for name, found in right.items()), flush=True)
    return {"title": "Attributes bound to their noun",
            "note": "Share of images whose nearest real emoji, in the features of a judge and among those whose name ends in "
                    f"the same noun, is the one asked for: {len(asked)} phrases such as \"green apple\", "
                    f"{samples} images each, {TASK.steps} steps. A guess would reach {chance:.2f}.",
            "columns": ["Run", "Right attribute", "Images", "Times the unedited run"],
            "rows": [[name, sum(found) / len(found), samples * len(found), seconds[name] / seconds["Unedited prompt"]]
                     for name, found in right.items()]}
