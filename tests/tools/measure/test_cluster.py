"""Sweeps spread over processes: nothing is lost when a worker dies, and a set drawn by two is the one drawn by one."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import untrained
from untrained import UNTRAINED

from accel_tools.measure import cluster
from accel_tools.measure.arms import Arm
from accel_tools.measure.cells import Cells
from accel_tools.measure.sweep import Bench, Suite

SUITE = Suite("small", images=7, rounds=2, seeds=(0, 1))


TASK = dataclasses.replace(UNTRAINED["dit"], batch=2)


class Slow:
    """Leaves a cell after a while, and first of all a note of the worker that tried."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number

    def __call__(self):
        (self.folder / f"{self.number}.{os.getpid()}.tried").touch()
        time.sleep(0.4)
        Cells(self.folder).numbers({"what": "square", "of": self.number}, lambda: self.number ** 2)


@pytest.fixture(scope="module")
def two_workers():
    ray = pytest.importorskip("ray")
    for module in (sys.modules[__name__], untrained):                        # workers cannot import from tests/
        ray.cloudpickle.register_pickle_by_value(module)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_worker_loses_no_cell_and_doubles_none(tmp_path, two_workers):
    jobs = [Slow(tmp_path, number) for number in range(12)]
    killer = subprocess.Popen([sys.executable, "-c", KILLER, str(tmp_path)])
    assert cluster.run(jobs) == [] and killer.wait() == 0
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(cell["value"] for cell in found) == [number ** 2 for number in range(12)]
    tried = [path.name.split(".")[:2] for path in tmp_path.glob("*.tried")]
    assert len({number for number, _ in tried}) == 12 < len(tried)          # the killed one's was tried by another worker


KILLER = f"""
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
while len(list(folder.glob("*.tried"))) < 5:
    time.sleep(0.02)
worker = max(folder.glob("*.tried"), key=lambda path: path.stat().st_mtime).name.split(".")[1]
os.kill(int(worker), {int(signal.SIGKILL)})
"""


@pytest.mark.slow
def test_a_job_that_fails_is_told_and_the_others_are_done(tmp_path, two_workers):
    jobs = [cluster.Job(TASK, SUITE, Cells(tmp_path), "macs", (arm,))
            for arm in (Arm(1), Arm(1, "tome", {"ratio": 7.0}), Arm(2))]
    failed, = cluster.run(jobs)
    assert "tome" in failed and len(list(tmp_path.glob("macs-*.json"))) == 2 and len(list(tmp_path.glob("*.error"))) == 1


@pytest.mark.slow
def test_cells_filled_by_workers_are_those_of_the_sweep(tmp_path, two_workers):
    """Drawn by Ray in one folder and by this process in another: the same cells with the same images."""
    mine, theirs = (Bench(TASK, SUITE, Cells(tmp_path / name)) for name in ("mine", "theirs"))
    tables = mine.compared([("fora", {"interval": 2})])
    arms = {repr(arm): arm for table in tables for arm in table.values()}.values()
    assert cluster.run([cluster.Job(TASK, SUITE, theirs.cells, "images", (arm, seed)) for arm in arms for seed in (0, 1)]) == []
    for arm in arms:
        for seed in SUITE.seeds:
            assert theirs.cells.has(theirs.images_identity(arm, seed))
            assert torch.equal(mine.images(arm, seed), theirs.images(arm, seed))
    assert cluster.run([cluster.Job(TASK, SUITE, theirs.cells, "seconds", (tables[0],))], alone=True) == []
    assert len(list((tmp_path / "theirs").glob("speed-*.json"))) == 1


TWO_RANKS = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import torch, torch.distributed as dist
from test_cluster import SUITE, TASK
from accel_tools.measure.arms import Arm
from accel_tools.measure.cells import Cells
from accel_tools.sample_set import draw
from accel_tools.measure.sweep import Bench
torch.set_num_threads(1)
dist.init_process_group("gloo")
bench = Bench(TASK, SUITE, Cells(Path({folder!r})))
for arm in (Arm(3), Arm(3, "fora", dict(interval=2))):
    images = draw(bench, arm, 0)
    assert (images is None) == (dist.get_rank() == 1)
    if images is not None:
        bench.cells.tensor(bench.images_identity(arm, 0), images.clone)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_draw_the_set_of_one_bit_for_bit(tmp_path):
    script = tmp_path / "ranks.py"
    here = Path(__file__).parent
    script.write_text(TWO_RANKS.format(path=[str(here), str(here.parents[1])], folder=str(tmp_path / "cells")))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    bench = Bench(TASK, SUITE, Cells(tmp_path / "cells"))
    for arm in (Arm(3), Arm(3, "fora", {"interval": 2})):
        with arm.applied(bench.pipe):
            alone = TASK.sample(bench.pipe, 3, bench.prompts(0), seed=0)
        assert bench.cells.has(bench.images_identity(arm, 0)) and torch.equal(bench.images(arm, 0), alone)
