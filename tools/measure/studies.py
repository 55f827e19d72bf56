"""What some methods are measured by besides the protocol of all: DaTo's plans are searched for, ToMe's binding is judged, and
TiTok's tokenizers are compared by their number of tokens.

    python tools/bench.py --studies [--method dato tome_binding titok]      adds them to catalog/results/<slug>.json

The first two run on the bundled UNet of emoji, the last on digits. A study is a table: {title, note, columns, rows} with its
settings and where it comes from; `code_hash` says of which code.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import methods
from accel_tools.measure import titok as of_tokens
from accel_tools.measure.arms import Arm
from accel_tools.measure.macs import count_macs
from accel_tools.measure.quality import nearest_emoji, psnr
from accel_tools.measure.records import code_hash_of, provenance
from accel_tools.measure.tasks import TASKS
from accel_tools.zoo import digits
from accel_tools.zoo.training import CHECKPOINTS
from methods import dato, titok, tome_binding
from methods._zoo import card

TASK = TASKS["unet"]


def plan_search(folder: Path, *, population: int = 15, generations: int = 30, images: int = 6, held_out: int = 24,
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
        return Arm(steps, "dato", {"plan": tuple(plan)})

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

    code = code_hash_of("dato").removeprefix("sha256:")
    name = f"dato-{TASK.model}-{card(TASK.model)['sha256'][:8]}-{code[:8]}-{population}-{images}.jsonl"
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
    return {"Unedited prompt": Arm(TASK.steps), "Tokens merged": Arm(TASK.steps, "tome_binding", merged),
            "Tokens merged, tuned and refined": Arm(TASK.steps, "tome_binding", tuned)}


def prompt_binding(folder: Path, *, samples: int = 2) -> dict[str, Any]:
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


def token_counts(folder: Path) -> dict[str, Any]:
    """Reconstruction and generation by the number of tokens. Needs the checkpoints of `train_zoo.py --method titok`."""
    images, labels = digits.split(held_out=True)
    grid, first = of_tokens.of_grid(images), next(iter(titok.TRAINED.values()))
    rows = [[f"{first.proxy_codes} means of patches", first.side ** 2, first.side ** 2 * (first.proxy_codes - 1).bit_length(),
             None, grid["mse"], grid["psnr"], *[None] * 2 * len(of_tokens.SAMPLED)]]
    for name, config in titok.TRAINED.items():
        model = titok.build(config)
        states = [torch.load(CHECKPOINTS / f"{name}-{stage}.ckpt", map_location="cpu")["averaged"] for stage in (0, 1)]
        moved = {key.split(".")[0] for key, value in states[0].items() if not torch.equal(value, states[1][key])}
        if moved != set(titok.STAGES["pixels"]):
            raise RuntimeError(f"tuning {name} on pixels changed {', '.join(sorted(moved))}")
        model.load_state_dict(states[0])
        before = of_tokens.reconstruction(model, images[1000:])["mse"]
        titok.load(model, methods.weights(name))
        found = of_tokens.metrics(model, images, labels)
        rows.append([name, config.tokens, config.tokens * (config.codes - 1).bit_length(), before, found["mse"], found["psnr"],
                     *found["label_accuracy"].values(), *found["frechet"].values()])
    return {"model": "digits", "title": "Digits by the number of tokens",
            "note": "Squared error in [0, 1] over 1,000 digits that nothing was trained on, after the stage of proxy codes and "
                    "after the decoder was tuned on pixels, which left encoder, latents and codebook as they were to the bit; "
                    f"then the share of {of_tokens.SAMPLES} generated digits in which a judge sees the one asked for, and "
                    "their Fréchet distance, by the number of steps; in a single step all digits of a class are the same. The "
                    "first row is the grid tokenizer whose codes are the proxy.",
            "columns": ["Tokenizer", "Tokens", "Bits an image", "Error, proxy stage", "Error", "PSNR (dB)",
                        *[f"{what}, {n}" for what in ("Right", "Fréchet") for n in of_tokens.SAMPLED]], "rows": rows}


STUDIES = {"dato": plan_search, "tome_binding": prompt_binding, "titok": token_counts}


def study(slug: str, folder: Path) -> dict[str, Any]:
    return {"model": TASK.model} | STUDIES[slug](folder) | provenance(slug)
