"""Schedules that are data: in which steps of a run each part of a model computes, found on that model beforehand.

A schedule holds for a model, a solver and a number of steps. What it is made from are the changes of what the parts give, seen
in runs of the model as it is.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from methods._core.cache import Slot
from methods._core.context import StepContext
from methods._core.patch import Patch

Schedule = Mapping[str, str | Sequence[str]]     # part -> a word as long as a run, "1" computes and "0" reuses; or one a length
Read = tuple[tuple[str, tuple[str, ...]], ...]
Changes = dict[tuple[str, int, int], list[float]]        # (part, lag, earlier step): of every place and run


def read(schedule: Schedule | Read | str | Path) -> Read:
    """A schedule, or the JSON file that it is in, so that it can be compared and hashed. A word that YAML took for a number is
    one: it begins with 1.

    Raises:
        ValueError: a word is not of 0 and 1, begins with 0, or has a length that another part has no word for.
    """
    given = dict(json.loads(Path(schedule).read_text()) if isinstance(schedule, (str, Path)) else schedule)
    found = {part: (str(words),) if isinstance(words, (str, int)) else tuple(map(str, words)) for part, words in given.items()}
    lengths = [sorted(map(len, words)) for words in found.values()]
    for part, words in found.items():
        for word in words:
            if not word or set(word) - {"0", "1"} or word[0] == "0":
                raise ValueError(f"schedule of {part!r}: {word!r} must be of 1 and 0, one for each step, and begin with 1")
    if any(each != lengths[0] or len(set(each)) < len(each) for each in lengths):
        raise ValueError(f"the parts of a schedule must have one word each for the same numbers of steps, not {lengths}")
    return tuple(sorted(found.items()))


def always(schedule: Read) -> bool:
    """Whether all compute in every step."""
    return not any("0" in word for _, words in schedule for word in words)


def of_length(schedule: Read, steps: int, name: str) -> dict[str, str]:
    """Part -> its word for a run of so many steps.

    Raises:
        ValueError: there is none.
    """
    for_steps = [{len(word): word for word in words} for _, words in schedule]
    if for_steps and steps not in for_steps[0]:
        known = ", ".join(map(str, sorted(for_steps[0])))
        raise ValueError(f"{name}: the schedule is for {known} steps, and this run has {steps}: make one from such a run")
    return {part: words[steps] for (part, _), words in zip(schedule, for_steps, strict=True)}


def watch(patch: Patch, places: Iterable[tuple[str, Sequence[Slot]]], lags: int, change: Callable[[Tensor, Tensor], float],
          changes: Changes) -> None:
    """Append to `changes` after every call of the denoiser `change(old, new)` of what the slots of each place keep, by its
    part, for every lag up to `lags`. All tensors of a place are one vector."""
    kept = [(part, slots, patch.slot()) for part, slots in places]        # with what was kept in the last steps, newest first

    def after(context: StepContext, output: Tensor) -> None:
        for part, slots, last in kept:
            if (new := _vector(slots)) is None:                           # left out of this call
                continue
            past = last.value or ()
            for lag, old in enumerate(past, 1):
                changes.setdefault((part, lag, context.i - lag), []).append(change(old, new))
                patch.counts["observed"] += 1
            last.value = (new, *past)[:lags]

    patch.after_call(after)


def _vector(slots: Sequence[Slot]) -> Tensor | None:
    values = [value if isinstance(value, tuple) else (value,) for value in (slot.get() for slot in slots)]
    found = [x.flatten() for value in values for x in value if x is not None]
    return torch.cat(found) if found else None


def means(changes: Changes) -> dict[str, list[list[float]]]:
    """Part -> for every lag, from 1 on, the mean change from each step to the one so much later; steps that no run has are left
    out, and none in between may be."""
    rows: dict[str, list[list[float]]] = {}
    for part, lag, step in sorted(changes):
        of_part = rows.setdefault(part, [])
        of_part.extend([] for _ in range(lag - len(of_part)))
        if step != len(of_part[lag - 1]):
            raise ValueError(f"no change of {part!r} from step {len(of_part[lag - 1])} was observed")
        values = changes[part, lag, step]
        of_part[lag - 1].append(sum(values) / len(values))
    return rows
