"""Which methods, with which settings, are worth their loss on a pipeline at hand, found by sampling with each."""
from __future__ import annotations

import importlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods._core.check import patches, settings
from methods._core.context import experts, split_target

SHARES = (0.8, 0.65, 0.5, 0.4, 0.3, 0.2)           # of the steps, along the curve of fewer steps
AMONG = 6                                          # of the best are tried in pairs, in fewer steps, on the calls kept back
BUDGETS = {"psnr": ">=", "distance": "<=", "speedup": ">="}


@dataclass(frozen=True)
class Recipe:
    """A number of steps and the methods that are put on, in this order: slug and Config, as JSON, of each."""

    steps: int
    patches: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        named = (slug if config == "{}" else f"{slug} {config}" for slug, config in self.patches)
        return " + ".join([f"{self.steps} steps", *named])

    def applied(self, pipe: Any) -> Applied:
        """Put the methods on a pipeline, all or none; ValueError where one of them refuses."""
        with ExitStack() as stack:
            on = {slug: stack.enter_context(_apply(pipe, slug, json.loads(config))) for slug, config in self.patches}
            return Applied(self.steps, on, stack.pop_all())


@dataclass
class Applied:
    """Methods at work on a pipeline, by slug, for runs of `steps` steps; `with` or `remove()` takes them off."""

    steps: int
    patches: dict[str, Any]
    stack: ExitStack

    def remove(self) -> None:
        self.stack.close()

    def report(self) -> dict[str, dict[str, Any]]:
        """What each did in the last run, by slug."""
        return {slug: patch.report() for slug, patch in self.patches.items()}

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass(frozen=True)
class Point:
    """What a recipe gave: speed-up over the plain run, PSNR to its images in dB, the mean of the caller's own `distance`.

    `state` is "engaged", "no gain", "refuses" or "fails", as of `methods.check`, with the reason in `why`.
    """

    recipe: Recipe
    state: str
    speedup: float = 0.0
    psnr: float = float("-inf")
    distance: float | None = None
    why: str = ""

    def __str__(self) -> str:
        far = "" if self.distance is None else f"  distance {self.distance:.4g}"
        what = f"{self.speedup:5.2f}x  {self.psnr:5.1f} dB{far}" if self.state == "engaged" else f"{self.state}: {self.why}"
        return f"{what}  {self.recipe}"


@dataclass(frozen=True)
class Tuned:
    """What `tune` found: `best` and the `rivals` in fewer steps as measured on the calls kept back, and all `points` of the
    search; printed as a table."""

    model: str
    plain: Recipe
    budget: str
    best: Point
    rivals: tuple[Point, ...]
    points: tuple[Point, ...]

    @property
    def frontier(self) -> list[Point]:
        """Points of the search that no other one beats in both speed and likeness, the slowest first."""
        ran = [point for point in self.points if point.state == "engaged"]
        return sorted((a for a in ran if not any(_beats(b, a) for b in ran)), key=lambda point: point.speedup)

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.plain}, {self.budget}: {self.best}"]
        if self.best.recipe == self.plain:
            lines.append("nothing that was tried keeps within the budget")
        elif not self.best.recipe.patches:
            lines.append("no method beats fewer steps here")
        lines += ["fewer steps, on the calls kept back:", *map(str, self.rivals)]
        lines += ["frontier of the search:", *map(str, self.frontier)]
        tried = {slug for point in self.points for slug, _ in point.recipe.patches}
        silent = tried - {slug for point in self.points if point.state == "engaged" for slug, _ in point.recipe.patches}
        return "\n".join([*lines, f"without gain here: {', '.join(sorted(silent)) or 'none'}"])

    def save(self, path: str | Path) -> None:
        """Write the best recipe for `load`, with what it gave."""
        found = {"model": self.model, "steps": self.best.recipe.steps,
                 "patches": [{"method": slug, "config": json.loads(config)} for slug, config in self.best.recipe.patches],
                 "plain_steps": self.plain.steps, "budget": self.budget, "speedup": round(self.best.speedup, 3),
                 "psnr": round(self.best.psnr, 2) if np.isfinite(self.best.psnr) else None, "distance": self.best.distance}
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


def load(pipe: Any, path: str | Path) -> Applied:
    """Put on a pipeline what `Tuned.save` wrote; `with` or `remove()` takes it off. Run it for as many steps as its `steps`.

    Raises:
        ValueError: it was found on another class of model, is no such file, or a method refuses.
    """
    try:
        found = json.loads(Path(path).read_text())
        recipe = Recipe(int(found["steps"]), tuple((each["method"], json.dumps(each["config"])) for each in found["patches"]))
        tuned_on = found["model"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what tune wrote: {error!r}") from None
    if (model := _name(pipe)) != tuned_on:
        raise ValueError(f"{path} was tuned on a {tuned_on}, this is a {model}")
    return recipe.applied(pipe)


def tune(pipe: Any, calls: Sequence[Mapping[str, Any] | str], *, steps: int, budget: str = "psnr>=30",
         distance: Callable[[Tensor, Tensor], float] | None = None, methods: Iterable[str] | None = None,
         journal: str | Path | None = None, seed: int = 0, tell: Callable[[str], None] | None = print) -> Tuned:
    """Search the fastest recipe within a budget of loss, or with a budget of speed the one most like the plain run.

    All methods are tried by themselves with the settings that they name in `TUNE`, mildest first and no further than the budget
    goes; the best of them in pairs; the best of all of these in fewer steps. The best of all are sampled again on every second
    call, which is kept back from the search, beside runs in fewer steps alone; one of those is the answer where it does better.

    Args:
        calls: arguments of at least two calls of the pipeline, or their prompts; number i starts from the noise of seed + i.
        steps: of the plain run, which all is compared with.
        budget: "psnr>=30" in dB, "distance<=0.1" by `distance`, or "speedup>=2".
        distance: of the images (..., H, W, C) in [0, 1] of a call to the plain ones, such as LPIPS.
        methods: slugs of those to try; None: all.
        journal: a file that keeps every result, from which a search that was stopped goes on.
        tell: called with a line for each recipe; None: silence.

    Raises:
        TypeError: no pipeline with a denoiser.
        ValueError: too few calls or steps, a budget that is none, or a journal of another search.
    """
    measure, bound = _budget(budget, distance)
    if len(calls) < 2 or steps < 2:
        raise ValueError("tune needs two calls or more, since every second one is kept back, and two steps or more")
    arguments = [{"prompt": call} if isinstance(call, str) else dict(call) for call in calls]
    known = {method.__name__.rpartition(".")[2]: method for method in patches()}
    chosen = set(known if methods is None else methods)
    if unknown := sorted(chosen - known.keys()):
        raise ValueError(f"no method can be tried by the name of {', '.join(unknown)}")
    plain = Recipe(steps)
    about = {"model": _name(pipe), "calls": repr(arguments), "steps": steps, "seed": seed, "distance": distance is not None}
    book = _Book(_Judge(pipe, arguments, plain, seed, distance), journal, about, tell)
    search, kept_back = range(0, len(arguments), 2), range(1, len(arguments), 2)

    def within(point: Point) -> bool:
        value = getattr(point, measure)
        return point.state == "engaged" and (value <= bound if BUDGETS[measure] == "<=" else value >= bound)

    def promising(point: Point) -> bool:
        return point.state == "engaged" if measure == "speedup" else within(point)      # speed can be added, likeness cannot

    def worth(point: Point) -> float:
        return _likeness(point) if measure == "speedup" else point.speedup

    curve = [Recipe(fewer) for fewer in dict.fromkeys(max(1, round(share * steps)) for share in SHARES) if fewer < steps]
    points = [book.judge(recipe, search) for recipe in curve]
    for slug, method in known.items():
        if slug in chosen:
            points += _by_itself(slug, method, steps, lambda recipe: book.judge(recipe, search),
                                 lambda point: point.state != "engaged" or promising(point))

    def best(fit: Callable[[Point], bool]) -> list[Point]:
        return sorted((point for point in points if promising(point) and fit(point)), key=worth, reverse=True)[:AMONG]

    for one, two in itertools.combinations(best(lambda point: len(point.recipe.patches) == 1), 2):
        if one.recipe.patches[0][0] != two.recipe.patches[0][0]:
            points.append(book.judge(Recipe(steps, one.recipe.patches + two.recipe.patches), search))
    for point, fewer in itertools.product(best(lambda point: bool(point.recipe.patches)), curve[:3]):
        points.append(book.judge(Recipe(fewer.steps, point.recipe.patches), search))

    equal = [Recipe(max(1, round(steps / point.speedup))) for point in best(within) if point.speedup > 1]
    rivals = [book.judge(recipe, kept_back) for recipe in dict.fromkeys([*curve, *equal]) if recipe != plain]
    finals = [book.judge(point.recipe, kept_back) for point in best(within) if point.recipe.patches]
    found = max(filter(within, [*rivals, *finals]), key=worth,
                default=Point(plain, "engaged", 1.0, float("inf"), None if distance is None else 0.0))
    return Tuned(_name(pipe), plain, budget, found, tuple(rivals), tuple(points))


def _by_itself(slug: str, method: ModuleType, steps: int, judge: Callable[[Recipe], Point],
               go_on: Callable[[Point], bool]) -> Iterator[Point]:
    """What a method gives with the settings it names, on the first ground that makes it run."""
    for ground in settings(method):
        ran = False
        for setting in getattr(method, "TUNE", ({},)):
            yield (point := judge(Recipe(steps, ((slug, json.dumps(ground | setting)),))))
            ran = ran or point.state == "engaged"
            if not go_on(point):
                break
        if ran:
            return


class _Judge:
    """Samples with a recipe and compares with the plain run of the same calls."""

    def __init__(self, pipe: Any, calls: Sequence[dict[str, Any]], plain: Recipe, seed: int,
                 distance: Callable[[Tensor, Tensor], float] | None):
        self.pipe, self.calls, self.plain, self.seed, self.distance = pipe, calls, plain, seed, distance
        self.known: dict[int, tuple[Tensor, float]] = {}             # images and seconds of plain calls

    @torch.no_grad()
    def draw(self, recipe: Recipe, number: int) -> tuple[Tensor, float]:
        """Images of a call, and its seconds."""
        start = time.perf_counter()
        out = self.pipe(num_inference_steps=recipe.steps, output_type="np",
                        generator=torch.Generator().manual_seed(self.seed + number), **self.calls[number])
        seconds = time.perf_counter() - start                        # arrays on the host: the device has finished
        return torch.as_tensor(np.asarray(out.frames if hasattr(out, "frames") else out.images)), seconds

    def __call__(self, recipe: Recipe, numbers: Sequence[int]) -> Point:
        for number in numbers:
            if number not in self.known:
                self.draw(self.plain, number)                        # the first call of a shape is slower
                self.known[number] = self.draw(self.plain, number)
        seconds, psnrs, distances = [], [], []
        try:
            with recipe.applied(self.pipe) as applied:
                for number in numbers:
                    images, taken = self.draw(recipe, number)
                    plain, _ = self.known[number]
                    seconds.append(taken)
                    psnrs.append(psnr(images, plain))
                    distances += [self.distance(images, plain)] if self.distance else []
                silent = {slug: report for slug, report in applied.report().items() if not report.get("saved")}
        except (TypeError, ValueError) as refusal:
            return Point(recipe, "refuses", why=str(refusal))
        except RuntimeError as error:
            return Point(recipe, "fails", why=str(error).splitlines()[0])
        if silent:
            reasons = (f"{slug}: {report.get('reason', 'it edits, and leaves nothing out')}" for slug, report in silent.items())
            return Point(recipe, "no gain", why="; ".join(reasons))
        now = self.draw(self.plain, numbers[0])[1] / self.known[numbers[0]][1]      # how busy the machine is, beside then
        speedup = median(now * self.known[number][1] / taken for number, taken in zip(numbers, seconds, strict=True))
        distance = float(np.mean(distances)) if distances else None
        return Point(recipe, "engaged", speedup, float(np.mean(psnrs)), distance)


class _Book:
    """Points of recipes, one JSON line each in a file, or in memory without one; none is measured twice."""

    def __init__(self, measure: _Judge, path: str | Path | None, search: dict[str, Any], tell: Callable[[str], None] | None):
        self.measure, self.path, self.tell = measure, Path(path) if path else None, tell
        self.points: dict[tuple[Recipe, tuple[int, ...]], Point] = {}
        text = self.path.read_text() if self.path and self.path.exists() else ""
        lines, self.rest = text.splitlines(), "\n" if text and not text.endswith("\n") else ""      # behind a line cut off
        if lines and json.loads(lines[0]) != search:
            raise ValueError(f"{path} is the journal of another search: {lines[0]}")
        for line in lines[1:]:
            try:
                found = json.loads(line)
            except json.JSONDecodeError:                             # cut off
                continue
            recipe = Recipe(found["recipe"]["steps"], tuple(map(tuple, found["recipe"]["patches"])))
            self.points[recipe, tuple(found["calls"])] = Point(
                recipe, *(found[name] for name in ("state", "speedup", "psnr", "distance", "why")))
        if self.path and not lines:
            self.path.write_text(json.dumps(search) + "\n")

    def judge(self, recipe: Recipe, calls: Sequence[int]) -> Point:
        key = recipe, tuple(calls)
        if key not in self.points:
            self.points[key] = point = self.measure(recipe, calls)
            if self.path:
                with self.path.open("a") as file:
                    file.write(self.rest + json.dumps(asdict(point) | {"calls": key[1]}) + "\n")
                self.rest = ""
            if self.tell:
                self.tell(f"{len(self.points)}: {point}")
        return self.points[key]


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over the batch of the peak signal-to-noise ratio in dB of images (B, ...) in [0, 1]; inf where all are equal. The
    frames of a clip count as one image."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def _apply(pipe: Any, slug: str, config: Mapping[str, Any]) -> Any:
    method = importlib.import_module(f"methods.{slug}")
    return method.apply(pipe, method.Config(**{name: tuple(value) if isinstance(value, list) else value
                                               for name, value in config.items()}))


def _name(pipe: Any) -> str:
    return type(split_target(experts(pipe)[0])[1]).__name__


def _likeness(point: Point) -> float:
    return point.psnr if point.distance is None else -point.distance


def _beats(one: Point, other: Point) -> bool:
    """Whether `one` ran, and is at least as fast and as close as `other`, and better in one of them."""
    mine, theirs = (one.speedup, _likeness(one)), (other.speedup, _likeness(other))
    return one.state == "engaged" and mine != theirs and mine[0] >= theirs[0] and mine[1] >= theirs[1]


def _budget(text: str, distance: Callable | None) -> tuple[str, float]:
    """"psnr>=30" -> ("psnr", 30.0)"""
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\d+(?:\.\d*)?|\.\d+)\s*", text)
    if match is None or BUDGETS.get(match[1]) != match[2]:
        known = ", ".join(f"{name}{sign}NUMBER" for name, sign in BUDGETS.items())
        raise ValueError(f"budget={text!r} must be one of {known}")
    if match[1] == "distance" and distance is None:
        raise ValueError(f"budget={text!r} needs a function `distance`")
    return match[1], float(match[3])
