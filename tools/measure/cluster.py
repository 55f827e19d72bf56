"""The cells of a sweep as Ray tasks: many workers fill one folder, from which the ordinary sweep then makes its records.

A cell is written whole or not at all and is named by all it depends on, so a task may run twice, or on a worker that dies:
Ray hands it to another one. The folder must be the same on every node, and this project installed there.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from accel_tools.measure.cells import Cells
from accel_tools.measure.sweep import Bench, Suite, Work
from accel_tools.measure.tasks import Task


class Job(NamedTuple):
    """One call of a Bench method, which leaves its cell in `cells`."""

    task: Task
    suite: Suite
    cells: Cells
    method: str
    args: tuple

    def __str__(self) -> str:
        return f"{self.method} of {', '.join(map(str, self.args))} on {self.task.model}"

    def __call__(self) -> None:
        torch.set_num_threads(1)
        getattr(_bench(self.task, self.suite, self.cells), self.method)(*self.args)


_bench = lru_cache(maxsize=1)(Bench)               # a worker keeps the model of its last job


def fill(benches: Iterable[tuple[Bench, Sequence[Work], bool]], address: str | None, timed: bool) -> list[str]:
    """Compute the cells of `bench.record` for each (bench, work, around) on the Ray cluster at `address`; None starts one of
    this machine's cores. Times are taken last, by one task to a node. -> a line for each failure"""
    import ray
    ray.init(address, log_to_driver=False)
    try:
        failed = []
        for bench, work, around in benches:
            def job(method: str, *args: Any, bench: Bench = bench) -> Job:
                return Job(bench.task, bench.suite, bench.cells, method, args)
            tables = bench.compared(work, around)
            arms = {repr(arm): arm for table in tables for arm in table.values()}.values()
            failed += run([job("images", arm, seed) for arm in arms for seed in bench.suite.seeds]
                          + [job("memory", arm) for arm in arms] + [job("macs", arm) for arm in arms])
            if timed:
                failed += run([job("seconds", table) for table in tables], alone=True)
        return failed
    finally:
        ray.shutdown()


def run(jobs: Sequence[Callable[[], Any]], *, alone: bool = False) -> list[str]:
    """Run every job on the connected cluster, `alone` with a whole node to itself, and wait. -> a line for each failure"""
    import ray
    cores = min(int(node["Resources"].get("CPU", 0)) or sys.maxsize for node in ray.nodes() if node["Alive"])
    task = ray.remote(num_cpus=cores if alone else 1, max_retries=-1)(_call)
    failed = []
    for job, pending in [(job, task.remote(job)) for job in jobs]:
        try:
            ray.get(pending)
        except Exception as error:                                  # its traceback is among the cells
            failed.append(f"{job}: {error}".splitlines()[0][:300])
    return failed


def _call(job: Callable[[], Any]) -> None:
    job()
