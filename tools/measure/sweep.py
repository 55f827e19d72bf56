"""Methods on a bundled model: the unaccelerated run, fewer steps of equal cost and the method, side by side."""
from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel_tools.catalog import Catalog
from accel_tools.measure.arms import Arm, offering
from accel_tools.measure.cells import Cells
from accel_tools.measure.macs import count_macs, equal_cost_steps
from accel_tools.measure.memory import in_fresh_process, peak_allocated, peak_resident
from accel_tools.measure.peers import installed
from accel_tools.measure.quality import psnr, ssim
from accel_tools.measure.records import code_hash_of, provenance
from accel_tools.measure.tasks import TASKS, Task
from accel_tools.measure.timing import compare, interleave
from accel_tools.zoo.machine import hardware
from methods._zoo import card

NEW_PROCESS = 10                                  # seconds until one has imported all it needs and loaded a model
Work = tuple[str, dict[str, Any]]                 # a method and its config


@dataclass(frozen=True)
class Suite:
    """How much is measured: `images` in all, split over `seeds`; `rounds` of interleaved timed runs."""

    name: str
    images: int
    rounds: int
    seeds: tuple[int, ...] = (0, 1, 2)

    def share(self, seed: int) -> tuple[int, int]:
        """How many images are drawn under one seed, and the number of the first of them."""
        place = self.seeds.index(seed)
        each, more = divmod(self.images, len(self.seeds))
        return each + (place < more), place * each + min(place, more)


QUICK = Suite("quick", images=60, rounds=3)
PAPER = Suite("paper", images=500, rounds=9)


def work(catalog: Catalog, model: str, chosen: Sequence[str] | None = None) -> list[Work]:
    """What is measured on a model: the configs that the entries name for it, the default one where an entry names none.

    Methods that edit beside an original, with `PROMPTS`, draw no images of this kind; they have studies.
    """
    kinds, edits = TASKS[model].kinds, offering("PROMPTS")
    return [(slug, config) for slug, entry in catalog.entries.items()
            if entry.kind in kinds and not entry.pending and slug not in edits and (chosen is None or slug in chosen)
            for config in entry.bench.get(model, [{}])]


class Bench:
    """All measurements of one model under one suite, each kept in `cells`."""

    def __init__(self, task: Task, suite: Suite, cells: Cells):
        self.task, self.suite, self.cells = task, suite, cells
        self.pipe = task.load()
        self.plain = Arm(task.steps)

    def identity(self, what: str, *arms: Arm, **more: Any) -> dict[str, Any]:
        code = {arm.method: code_hash_of(arm.method) for arm in arms if arm.method}
        made = card(self.task.model)
        return {"what": what, "model": self.task.model, "weights": made["sha256"], "model_config": made["config"],
                "torch": torch.__version__, "arms": [asdict(arm) for arm in arms], "code": code,
                "guidance": self.task.guidance, **more}

    def refusal(self, slug: str, config: dict[str, Any]) -> str | None:
        """Why a method does not work on this model, in its own words; None where it does, or fails in another way."""
        try:
            with Arm(self.task.steps, slug, config).applied(self.pipe):
                return None
        except ValueError as error:
            return str(error)
        except Exception:                                          # the sweep will meet it again and record it
            return None

    def macs(self, arm: Arm) -> int:
        """Multiply-accumulates of one image; of a decoder, whose passes differ from image to image, the mean of those timed."""
        prompts = self.task.prompts(1 if arm.steps else self.task.timed)

        def count() -> int:
            with arm.applied(self.pipe):
                return count_macs(lambda: self.task.sample(self.pipe, arm.steps, prompts)) // len(prompts)
        return self.cells.numbers(self.identity("macs", arm, n=len(prompts)), count)

    def arms(self, method: Arm) -> dict[str, Arm]:
        """The arms of a table; without "fewer_steps" where the model has no such run."""
        plain = self.task.plain(method.method)
        if self.task.no_fewer_steps:
            return {"plain": plain, "method": method}
        fewer = equal_cost_steps(self.macs(method), self.macs(plain), plain.steps)
        return {"plain": plain, "fewer_steps": Arm(fewer), "method": method}

    def compared(self, work: Iterable[Work], around: bool = True) -> list[dict[str, Arm]]:
        """The arms of every table of `work`, and with `around` those of the curve of fewer steps. A method that fails to
        run is left out; the sweep will meet it again and record it."""
        tables = [{"plain": self.plain} | {str(steps): Arm(steps) for steps in self.task.curve}] if around else []
        for slug, config in work:
            try:
                tables.append(self.arms(Arm(self.task.steps, slug, config)))
            except Exception:
                continue
        return tables

    def images_identity(self, arm: Arm, seed: int) -> dict[str, Any]:
        n, first = self.suite.share(seed)
        return self.identity("images", arm, seed=seed, n=n, first=first, batch=self.task.batch)

    def prompts(self, seed: int) -> list[Any]:
        return self.task.prompts(*self.suite.share(seed))

    def images(self, arm: Arm, seed: int) -> Tensor:
        def draw() -> Tensor:
            with arm.applied(self.pipe):
                return self.task.sample(self.pipe, arm.steps, self.prompts(seed), seed=seed)
        return self.cells.tensor(self.images_identity(arm, seed), draw)

    def quality(self, arm: Arm, plain: Arm) -> dict[str, Any]:
        """What the judge says of all images, distance to the plain ones, and the range over the seeds."""
        sets = [self.images(arm, seed) for seed in self.suite.seeds]
        prompts = [self.prompts(seed) for seed in self.suite.seeds]
        result = self.task.quality(torch.cat(sets), sum(prompts, []))
        scores = [self.task.quality(images, asked)[self.task.score] for images, asked in zip(sets, prompts, strict=True)]
        result[f"{self.task.score}_spread"] = [min(scores), max(scores)]
        if arm != plain and self.task.paired:
            result |= self.distances(sets, plain)
        return result

    def distances(self, sets: list[Tensor], plain: Arm) -> dict[str, Any]:
        """Mean distance of the sets of all seeds to the plain ones, and its range over the seeds."""
        found: dict[str, Any] = {}
        for key, measure in (("psnr", psnr), ("ssim", ssim)):
            values = [measure(images, self.images(plain, seed)) for images, seed in zip(sets, self.suite.seeds, strict=True)]
            mean = sum(value * len(images) for value, images in zip(values, sets, strict=True)) / sum(map(len, sets))
            found |= {key: mean, f"{key}_spread": [min(values), max(values)]}
        return found

    def seconds(self, arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
        """Latency and speed-up of the arms of a table; the plain arm's speed-up is A/A, against itself."""
        runs = {"plain": arms["plain"], "again": arms["plain"]} | arms
        prompts = self.task.prompts(self.task.timed)

        def time_all() -> dict[str, list[float]]:
            calls = {name: partial(self.task.sample, self.pipe, arm.steps, prompts) for name, arm in runs.items()}
            return interleave(calls, self.suite.rounds, {name: partial(arm.applied, self.pipe) for name, arm in runs.items()})

        identity = self.identity("speed", *runs.values(), images=len(prompts), rounds=self.suite.rounds, hardware=hardware())
        seconds = self.cells.numbers(identity, time_all)
        return {name: compare(seconds["plain"], seconds["again" if name == "plain" else name]) for name in arms}

    def memory(self, arm: Arm) -> dict[str, Any]:
        return self.cells.numbers(self.memory_identity(arm), lambda: memory_of(self.task.model, arm, self.task.timed))

    def memory_identity(self, arm: Arm) -> dict[str, Any]:
        return self.identity("memory", arm, n=self.task.timed)

    def arm(self, arm: Arm, plain: Arm) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that is known of an arm without a clock, and its patch's report."""
        memory = self.memory(arm)
        report = memory.pop("report")
        return {**self.length(arm), "macs": self.macs(arm), **memory, "cached_bytes": report.get("cached_bytes", 0),
                **self.quality(arm, plain)}, report

    def length(self, arm: Arm) -> dict[str, int]:
        """The steps of an arm, or the passes through the model that a decoder takes for the images that are timed."""
        if arm.steps:
            return {"steps": arm.steps}

        def count() -> int:
            with arm.applied(self.pipe) as decoder:
                self.task.sample(self.pipe, None, self.task.prompts(self.task.timed))
                return decoder.report()["passes"]
        return {"passes": self.cells.numbers(self.identity("passes", arm, images=self.task.timed), count)}

    def settings(self) -> dict[str, Any]:
        """How much was measured, and how the model was run."""
        task = self.task
        return asdict(self.suite) | {"steps": task.steps, "guidance": task.guidance, "batch": task.batch,
                                     "timed_images": task.timed}

    def record(self, slug: str, config: dict[str, Any], timed: bool = True) -> dict[str, Any]:
        """Everything about one method and config."""
        method = Arm(self.task.steps, slug, config)
        arms = self.arms(method)
        speed = self.seconds(arms) if timed else {}
        measured, report = {}, {}
        for name, arm in arms.items():
            found, report = self.arm(arm, arms["plain"])
            measured[name] = found | speed.get(name, {})
        missing = {"missing": {"fewer_steps": self.task.no_fewer_steps}} if self.task.no_fewer_steps else {}
        return {"model": self.task.model, "config": config, "suite": self.settings(), "arms": measured, **missing,
                "report": report, "real_vs_real": self.task.real_frechet(self.suite.images), **provenance(slug)}

    def baseline(self, timed: bool = True) -> dict[str, Any]:
        """The plain run and the same with fewer steps, one after the other along the task's curve."""
        arms, = self.compared([])
        speed = self.seconds(arms) if timed else {}
        curve = [self.arm(arm, self.plain)[0] | speed.get(name, {}) for name, arm in arms.items()]
        return {"suite": self.settings(), "score": self.task.score, "curve": curve,
                "real_vs_real": self.task.real_frechet(self.suite.images), **provenance()}

    def peers(self, timed: bool = True) -> dict[str, Any]:
        """The packages of others that are installed, each beside the plain run, or what it raised."""
        runs = []
        for arm in installed(self.task.steps):
            run = {"package": arm.peer, "version": arm.version, "config": arm.config}
            try:
                found, _ = self.arm(arm, self.plain)
                found.pop("cached_bytes")                          # no package says how much it keeps
                if found["psnr"] == math.inf:
                    raise ValueError("it runs and changes nothing")
                speed = self.seconds({"plain": self.plain, "peer": arm})["peer"] if timed else {}
                runs.append(run | {"arm": found | speed})
            except Exception as error:
                runs.append(run | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
            self.pipe = self.task.load()
        return {"suite": self.settings(), "runs": runs, **provenance()}

    def estimate(self, work: Iterable[Work], timed: bool = True, around: bool = False) -> float:
        """Seconds that the missing cells of `compared(work, around)` will take, from the MACs of each and the rate of one
        short plain run just made."""
        prompts = self.task.prompts(self.task.timed)
        rate, total, seen = 0.0, 0.0, set()
        for arms in self.compared(work, around):
            rate = rate or self.rate(arms["plain"])
            for arm in arms.values():
                total += timed * rate * self.macs(arm) * len(prompts) * (self.suite.rounds + 1)
                for identity in (self.memory_identity(arm), *(self.images_identity(arm, seed) for seed in self.suite.seeds)):
                    if (key := json.dumps(identity)) not in seen and not self.cells.has(identity):
                        memory = identity["what"] == "memory"              # a new process that samples three times
                        total += rate * self.macs(arm) * identity["n"] * (3 if memory else 1) + memory * NEW_PROCESS
                    seen.add(key)
        return total

    def rate(self, plain: Arm) -> float:
        """Seconds of one multiply-accumulate, by a warm plain run of at most two steps."""
        arm = Arm(2) if plain.steps else plain
        prompts = self.task.prompts(self.task.timed)
        with arm.applied(self.pipe):
            self.task.sample(self.pipe, arm.steps, prompts)
            start = time.perf_counter()
            self.task.sample(self.pipe, arm.steps, prompts)
            elapsed = time.perf_counter() - start
        return elapsed / (self.macs(arm) * len(prompts))

    def run(self, work: Iterable[Work], keep: Callable[[str, dict[str, Any]], Any], timed: bool = True) -> list[str]:
        """Hand each record to `keep(slug, record)` as it is done. -> a line for each config that failed; errors are among
        the cells."""
        failed = []
        for slug, config in work:
            try:
                keep(slug, self.record(slug, config, timed))
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{slug} {config} on {self.task.model}: {error}")
        return failed


def memory_of(model: str, arm: Arm, images: int) -> dict[str, Any]:
    """Bytes that sampling `images` images of a bundled model takes in a fresh process, and the patch's report."""
    return in_fresh_process(_memory_of, model, arm, images)


def _memory_of(model: str, arm: Arm, images: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    task = TASKS[model]
    pipe, prompts = task.load(), task.prompts(images)
    with task.plain(arm.method).applied(pipe):
        task.sample(pipe, 2, prompts[:1])                          # what torch sets up once belongs to no arm
    with arm.applied(pipe) as method:
        before = peak_resident()
        task.sample(pipe, arm.steps, prompts)
        grown = None if before is None else peak_resident() - before
        report = {} if method is None else method.report()
        allocated = peak_allocated(lambda: task.sample(pipe, arm.steps, prompts))
    return {"peak_bytes": allocated, "peak_resident_bytes": grown, "report": report}
