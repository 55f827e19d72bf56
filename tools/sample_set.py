"""Draws the image sets of a sweep by several processes, each the batches that fall to it.

    torchrun --nproc-per-node 4 tools/sample_set.py --model dit --suite paper

The noise of a batch depends on its seed and place alone, so a set is bit for bit what one process draws with as many threads.
The sets become cells: `tools/bench.py` finds them. On CUDA each process takes the device of its local rank.
"""
from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from accel_tools.catalog import load
from accel_tools.measure.arms import Arm, batches
from accel_tools.measure.cells import FOLDER, Cells
from accel_tools.measure.sweep import PAPER, QUICK, Bench, work
from accel_tools.measure.tasks import TASKS, bundled


def share(bench: Bench, arm: Arm, seed: int, rank: int, world: int) -> dict[int, Tensor]:
    """The batches of one set that fall to a rank, by their first image."""
    prompts, task = bench.prompts(seed), bench.task
    with arm.applied(bench.pipe):
        return {part.start: task.draw(bench.pipe, arm.steps, prompts[part], seed=seed, first=part.start, guidance=task.guidance)
                for part in batches(len(prompts), task.batch)[rank::world]}


def draw(bench: Bench, arm: Arm, seed: int) -> Tensor | None:
    """One set on rank 0, None on the others; every rank must call it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts: list[dict[int, Tensor]] | None = [{}] * world if rank == 0 else None
    dist.gather_object(share(bench, arm, seed, rank, world), parts)
    if parts is None:
        return None
    whole = {start: images for part in parts for start, images in part.items()}
    return torch.cat([whole[start] for start in sorted(whole)])


def missing(bench: Bench, methods: Sequence[str] | None) -> list[tuple[Arm, int]]:
    """The sets that the sweep needs and no cell holds, the same list on every rank."""
    found: list = [None]
    if dist.get_rank() == 0:
        wanted = [each for each in work(load(), bench.task.model, methods) if bench.refusal(*each) is None]
        arms = {repr(arm): arm for table in bench.compared(wanted, methods is None) for arm in table.values()}
        found = [[(arm, seed) for arm in arms.values() for seed in bench.suite.seeds
                  if not bench.cells.has(bench.images_identity(arm, seed))]]
    dist.broadcast_object_list(found)
    return found[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=TASKS, metavar="MODEL", help=f"only these of {', '.join(TASKS)}")
    parser.add_argument("--method", nargs="+", metavar="SLUG", help="only these methods")
    parser.add_argument("--suite", choices=("quick", "paper"), default="paper")
    parser.add_argument("--images", type=int, help="images an arm, in place of the suite's")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    args = parser.parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        parser.error("run me under torchrun: torchrun --nproc-per-node 2 tools/sample_set.py")
    torch.set_num_threads(args.threads)
    suite = PAPER if args.suite == "paper" else QUICK
    suite = dataclasses.replace(suite, images=args.images or suite.images)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    for model in args.model or bundled():
        bench = Bench(TASKS[model], suite, Cells(FOLDER))
        if torch.cuda.is_available() and hasattr(bench.pipe, "to"):
            bench.pipe.to(f"cuda:{os.environ['LOCAL_RANK']}")
        for arm, seed in missing(bench, args.method):
            images = draw(bench, arm, seed)
            if images is not None:
                bench.cells.tensor(bench.images_identity(arm, seed), images.clone)
                print(f"{model}, {arm}, seed {seed}: {len(images)} images", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
