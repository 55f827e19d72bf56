"""Measures methods by one protocol and writes catalog/results/<slug>.json and catalog/baselines/<model>.json.

    python tools/bench.py                            the quick suite: every method on every bundled model that takes it
    python tools/bench.py --suite paper              the same with 500 images and more rounds
    python tools/bench.py --model unet --method tome deepcache
    python tools/bench.py --suite paper --ray auto   its cells computed by the workers of a Ray cluster
    python tools/bench.py --method tome --realistic  speed on models of real size with random weights, beside the MAC bound
    python tools/bench.py --overhead                 what an applied off switch costs
    python tools/bench.py --plans                    what reducing tokens costs by itself, beside the tomesd package
    python tools/bench.py --studies                  what a method is measured by besides, tools/measure/<slug>.py
    python tools/bench.py --catalog                  how the catalogue tools grow
    python tools/bench.py --kernels                  Triton kernels against their references

The entries of the catalogue say which configs are measured (`bench:`). A sweep can be killed and continues where it was:
finished pieces lie in build/bench/cells. Timings are paired and interleaved; run them on a machine that does nothing else.
Results are written only from a tree as it was committed, unless `--dirty` says that any will do. `--untimed` does all that a
busy machine cannot spoil, and leaves the results as they are.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from accel_tools.catalog import load
from accel_tools.measure import cluster, growth, kernels, plans, records, studies
from accel_tools.measure.arms import offering
from accel_tools.measure.cells import FOLDER, Cells
from accel_tools.measure.realistic import Case, Realistic, cases, switches
from accel_tools.measure.sweep import PAPER, QUICK, Bench, Work, work
from accel_tools.measure.tasks import TASKS, bundled


def suite(args: argparse.Namespace, cells: Cells) -> list[str]:
    """Every method that was asked for on every model that was. -> a line for each failure"""
    chosen = PAPER if args.suite == "paper" else QUICK
    chosen = dataclasses.replace(chosen, images=args.images or chosen.images, rounds=args.rounds or chosen.rounds)
    catalog, timed = load(), not args.untimed
    planned = [Plan(Bench(TASKS[model], chosen, cells), work(catalog, model, args.method), around=not args.method)
             for model in args.model or bundled()]
    minutes = [plan.bench.estimate(plan.work, timed, plan.around) / 60 for plan in planned]
    for plan, each in zip(planned, minutes, strict=True):
        print(f"{plan.bench.task.model}: {len(plan.work)} configs, about {each:.0f} minutes of sampling")
        for slug, reason in plan.refused.items():
            print(f"  not {slug}: {reason}")
    print(f"{chosen.images} images an arm, {sum(minutes):.0f} minutes in all", flush=True)
    if args.ray is not None:                                       # what fails there is met again, and told, by the sweep
        cluster.fill([(plan.bench, plan.work, plan.around) for plan in planned], args.ray or None, timed)
    return [line for plan in planned for line in sweep(plan, timed)]


class Plan:
    """What is measured on one model: `work`, and with `around` what it stands beside, the curve of fewer steps and the
    packages of others. `refused` is what does not work."""

    def __init__(self, bench: Bench, wanted: list[Work], around: bool):
        self.bench, self.around = bench, around and bool(bench.task.curve)
        reasons = [(slug, config, bench.refusal(slug, config)) for slug, config in wanted]
        self.work = [(slug, config) for slug, config, reason in reasons if reason is None]
        self.refused = {slug: reason for slug, _, reason in reasons if reason is not None}


def sweep(plan: Plan, timed: bool) -> list[str]:
    """Measure a plan and write what it gives. -> a line for each failure"""
    bench, failed = plan.bench, []

    def keep(slug: str, record: dict) -> None:
        if timed:
            records.write(slug, [record])
        show(record, slug)
    for part, measure in (("plain", bench.baseline), ("peers", bench.peers)) if plan.around else ():
        try:
            found = measure(timed)
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{part} of {bench.task.model}: {error}")
            continue
        if timed:
            records.write_baseline(bench.task.model, {part: found})
        for run in found.get("curve", found.get("runs")):
            print(f"{bench.task.model}, {part}: {json.dumps(records.rounded(run))}", flush=True)
    return failed + bench.run(plan.work, keep, timed)


def show(record: dict, slug: str) -> None:
    print(f"{slug} {record['config']} on {record['model']}")
    for name, part in (record["arms"] | {"peer": record.get("peer", {})}).items():
        if part:
            print(f"  {name}: {json.dumps(records.rounded(part))}", flush=True)


def each_case(cases: list[Case], measure: Callable[[Case], dict], args: argparse.Namespace) -> list[str]:
    """`measure` of each case of the chosen methods, written at once. -> a line for each failure"""
    failed = []
    for case in cases:
        slug = case.arm.method
        if slug not in (args.method or [slug]):
            continue
        try:
            record = measure(case)
        except Exception as error:                                  # its traceback is among the cells
            failed.append(f"{slug} {case.arm.config} on {case.model}: {error}")
            continue
        records.write(slug, [record])
        show(record, slug)
    return failed


def all_kernels() -> list[str]:
    """Each Triton kernel against its reference, or without a CUDA device what the compiler says of it."""
    if torch.cuda.is_available():
        for row in kernels.measure():
            print(json.dumps(records.rounded(row)), flush=True)
        return []
    print("no CUDA device: kernels cannot be timed here; what they compile to ahead of time:", flush=True)
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "compile_kernels.py")])
    return ["kernels: see the problems in the table"] if done.returncode else []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", metavar="SLUG", help="only these methods")
    parser.add_argument("--model", nargs="+", choices=TASKS, metavar="MODEL", help=f"only these of {', '.join(TASKS)}")
    parser.add_argument("--suite", choices=("quick", "paper"), help="default: quick, unless another measurement is named")
    parser.add_argument("--images", type=int, help="images an arm, in place of the suite's")
    parser.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="compute the cells of the suite on this Ray "
                        "cluster, or on one started here, that shares this folder")
    parser.add_argument("--untimed", action="store_true", help="only images, MACs and memory; writes no results")
    parser.add_argument("--realistic", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--studies", action="store_true")
    parser.add_argument("--catalog", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--rounds", type=int,
                        help="interleaved rounds, in place of the suite's, of 5 (--realistic), 31 (--overhead) or 9 (--plans)")
    parser.add_argument("--dirty", action="store_true", help="write results although the tree differs from its commit")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, recorded with the results")
    args = parser.parse_args(argv)
    others = args.realistic or args.overhead or args.plans or args.studies
    sweeps = bool(args.suite) or not (others or args.catalog or args.kernels)
    if (others or sweeps and not args.untimed) and not args.dirty and (reason := records.dirty_tree()):
        parser.error(reason)
    torch.set_num_threads(args.threads)
    cells, failed = Cells(FOLDER), []
    if sweeps:
        failed += suite(args, cells)
    if args.realistic:
        failed += each_case(cases(load()), Realistic(cells, args.rounds or 5).record, args)
    if args.overhead:
        failed += each_case(switches(load()), Realistic(cells, args.rounds or 31).overhead, args)
    if args.plans:
        print(json.dumps(records.write_plans(plans.measure(args.rounds or 9)), indent=1), flush=True)
    if args.studies:
        for slug in (slug for slug in offering("study") if slug in (args.method or [slug])):
            found = studies.study(slug, FOLDER.parent)
            records.write_study(slug, found)
            print(json.dumps(records.rounded(found), indent=1), flush=True)
    if args.catalog:
        for n in (52, 500, 5000):
            print(json.dumps(growth.measure(n)), flush=True)
    if args.kernels:
        failed += all_kernels()
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
