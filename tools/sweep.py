"""Methods on a small trained model: the unaccelerated run, fewer steps of equal cost and the method, side by side."""
from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import methods
from accel_tools.arms import Arm, sample
from accel_tools.cells import Cells
from accel_tools.macs import count_macs, equal_cost_steps
from accel_tools.memory import in_fresh_process, peak_allocated, peak_resident
from accel_tools.quality import psnr, quality, real_frechet, ssim
from accel_tools.records import code_hash_of, hardware, provenance
from accel_tools.timing import compare, interleave
from methods._zoo import card

CONFIGS: dict[str, list[tuple[str, dict[str, Any]]]] = {"dit": [
    ("tome", {"ratio": 0.5}), ("todo", {"factor": 2}), ("fora", {"interval": 2}), ("fora", {"interval": 3}), ("toca", {}),
    ("pfdiff", {"k": 1}), ("pfdiff", {"k": 2})]}


@dataclass(frozen=True)
class Suite:
    """How much is measured: `images` in all, split over `seeds`; `rounds` of interleaved runs of `timed_images` each."""

    name: str
    images: int
    rounds: int
    steps: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)
    guidance: float = 2.0
    batch: int = 50
    timed_images: int = 4

    def labels(self, seed: int) -> list[int]:
        """The classes asked for under one seed; all seeds together ask for `images`."""
        place = self.seeds.index(seed)
        share = self.images // len(self.seeds) + (place < self.images % len(self.seeds))
        return [i % 10 for i in range(share)]


QUICK = Suite("quick", images=100, rounds=5)
PAPER = Suite("paper", images=500, rounds=9)


class Bench:
    """All measurements of one model under one suite, each kept in `cells`."""

    def __init__(self, model: str, suite: Suite, cells: Cells, *, load: Callable[[str], Any] = methods.tiny):
        self.model, self.suite, self.cells = model, suite, cells
        self.pipe = load(model)
        self.plain = Arm(suite.steps)

    def identity(self, what: str, *arms: Arm, **more: Any) -> dict[str, Any]:
        code = {arm.method: code_hash_of(arm.method) for arm in arms if arm.method}
        return {"what": what, "model": self.model, "weights": card(self.model)["sha256"],
                "model_config": card(self.model)["config"], "torch": torch.__version__,
                "arms": [asdict(arm) for arm in arms], "code": code, **more}

    def macs(self, arm: Arm) -> int:
        """Multiply-accumulates of one image."""
        def count() -> int:
            with arm.applied(self.pipe):
                return count_macs(lambda: sample(self.pipe, arm.steps, [0]))
        return self.cells.numbers(self.identity("macs", arm), count)

    def fewer(self, arm: Arm) -> Arm:
        """The plain arm that costs what `arm` costs, or just below."""
        return Arm(equal_cost_steps(self.macs(arm), self.macs(self.plain), self.plain.steps))

    def images_identity(self, arm: Arm, seed: int) -> dict[str, Any]:
        suite = self.suite
        return self.identity("images", arm, seed=seed, n=len(suite.labels(seed)), guidance=suite.guidance, batch=suite.batch)

    def images(self, arm: Arm, seed: int) -> Tensor:
        def draw() -> Tensor:
            with arm.applied(self.pipe):
                return sample(self.pipe, arm.steps, self.suite.labels(seed), seed=seed, guidance=self.suite.guidance,
                              batch=self.suite.batch)
        return self.cells.tensor(self.images_identity(arm, seed), draw)

    def quality(self, arm: Arm) -> dict[str, Any]:
        """What the judge says of all images, distance to the plain ones, and the range over the seeds."""
        found: dict[str, list[Any]] = {"images": [], "labels": [], "plain": [], "label_accuracy": [], "psnr": [], "ssim": []}
        for seed in self.suite.seeds:
            images, plain = self.images(arm, seed), self.images(self.plain, seed)
            labels = torch.tensor(self.suite.labels(seed))
            one = {"images": images, "labels": labels, "label_accuracy": quality(images, labels)["label_accuracy"]}
            if arm != self.plain:
                one |= {"psnr": psnr(images, plain), "ssim": ssim(images, plain)}
            for key, value in one.items():
                found[key].append(value)
        result = quality(torch.cat(found["images"]), torch.cat(found["labels"]))
        result["recall"] = {str(digit): share for digit, share in enumerate(result["recall"])}
        sizes = [len(images) for images in found["images"]]
        for key in ("psnr", "ssim"):
            if found[key]:
                result[key] = sum(v * n for v, n in zip(found[key], sizes, strict=True)) / sum(sizes)
        return result | {f"{key}_spread": [min(found[key]), max(found[key])]
                         for key in ("label_accuracy", "psnr", "ssim") if found[key]}

    def speed(self, arm: Arm) -> dict[str, dict[str, Any]]:
        """Latency and speed-up of the three arms; the plain arm's speed-up is A/A, against itself."""
        arms = {"plain": self.plain, "again": self.plain, "fewer_steps": self.fewer(arm), "method": arm}
        labels = [i % 10 for i in range(self.suite.timed_images)]

        def time_all() -> dict[str, list[float]]:
            calls = {name: partial(sample, self.pipe, each.steps, labels) for name, each in arms.items()}
            return interleave(calls, self.suite.rounds, {name: partial(each.applied, self.pipe) for name, each in arms.items()})

        identity = self.identity("speed", *arms.values(), images=len(labels), rounds=self.suite.rounds, hardware=hardware())
        seconds = self.cells.numbers(identity, time_all)
        return {"plain": compare(seconds["plain"], seconds["again"]),
                "fewer_steps": compare(seconds["plain"], seconds["fewer_steps"]),
                "method": compare(seconds["plain"], seconds["method"])}

    def memory(self, arm: Arm) -> dict[str, Any]:
        n = self.suite.timed_images
        return self.cells.numbers(self.identity("memory", arm, images=n), lambda: memory_of(self.model, arm, n))

    def record(self, slug: str, config: dict[str, Any], timed: bool = True) -> dict[str, Any]:
        """Everything about one method and config."""
        method = Arm(self.suite.steps, slug, config)
        arms = {"plain": self.plain, "fewer_steps": self.fewer(method), "method": method}
        speed = self.speed(method) if timed else {}
        measured, report = {}, {}
        for name, arm in arms.items():
            memory = self.memory(arm)
            report = memory.pop("report")
            measured[name] = {"steps": arm.steps, **speed.get(name, {}), "macs": self.macs(arm), **memory,
                              "cached_bytes": report.get("cached_bytes", 0), **self.quality(arm)}
        return {"model": self.model, "config": config, "suite": asdict(self.suite), "arms": measured, "report": report,
                "real_vs_real": real_frechet(self.suite.images), **provenance(slug)}

    def estimate(self, work: Iterable[tuple[str, dict[str, Any]]], timed: bool = True) -> float:
        """Seconds the missing cells will take, from the MACs of each and the rate of one plain run just made."""
        labels = [0] * self.suite.timed_images
        sample(self.pipe, 1, labels)
        start = time.perf_counter()
        sample(self.pipe, 2, labels)
        rate = (time.perf_counter() - start) / (self.macs(Arm(2)) * len(labels))
        total, seen = 0.0, set()
        for slug, config in work:
            method = Arm(self.suite.steps, slug, config)
            try:
                arms = [self.plain, self.fewer(method), method]
            except Exception:                                      # the sweep will meet it again and record it
                continue
            for arm in arms:
                total += timed * rate * self.macs(arm) * len(labels) * self.suite.rounds
                for seed in self.suite.seeds:
                    identity = self.images_identity(arm, seed)
                    if (key := json.dumps(identity)) not in seen and not self.cells.has(identity):
                        total += rate * self.macs(arm) * identity["n"]
                    seen.add(key)
        return total

    def run(self, work: Iterable[tuple[str, dict[str, Any]]], keep: Callable[[str, dict[str, Any]], Any],
            timed: bool = True) -> list[str]:
        """Hand each record to `keep(slug, record)` as it is done. -> a line for each config that failed; errors are among
        the cells."""
        failed = []
        for slug, config in work:
            try:
                keep(slug, self.record(slug, config, timed))
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{slug} {config}: {error}")
        return failed


def memory_of(model: str, arm: Arm, images: int) -> dict[str, Any]:
    """Bytes that sampling `images` images of a small model takes in a fresh process, and the patch's report."""
    return in_fresh_process(_memory_of, model, arm, images)


def _memory_of(model: str, arm: Arm, images: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    pipe = methods.tiny(model)
    labels = [i % 10 for i in range(images)]
    sample(pipe, 2, labels[:1])                                    # what torch sets up once belongs to no arm
    with arm.applied(pipe) as patch:
        before = peak_resident()
        sample(pipe, arm.steps, labels)
        grown = None if before is None else peak_resident() - before
        report = {} if patch is None else patch.report()
        allocated = peak_allocated(lambda: sample(pipe, arm.steps, labels))
    return {"peak_bytes": allocated, "peak_resident_bytes": grown, "report": report}
