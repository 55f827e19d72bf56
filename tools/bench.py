"""Measures methods by one protocol and writes catalog/results/<slug>.json.

    python tools/bench.py                            the quick suite on the digit DiT: 100 images, 20 steps, all methods
    python tools/bench.py --suite paper              the same with 500 images and more rounds
    python tools/bench.py --method tome --realistic  speed on models of real size with random weights, beside the MAC bound
    python tools/bench.py --overhead                 what an applied off switch costs
    python tools/bench.py --catalog                  how the catalogue tools grow
    python tools/bench.py --kernels                  Triton kernels against their references

A sweep can be killed and continues where it was: finished pieces lie in build/bench/cells. Timings are paired and
interleaved; run them on a machine that does nothing else. `--untimed` does all that a busy machine cannot spoil, and
leaves the results as they are.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from accel_tools import catalog_bench, kernel_bench, records
from accel_tools.catalog import ROOT
from accel_tools.cells import Cells
from accel_tools.realistic import CASES, SWITCHES, Case, Realistic
from accel_tools.sweep import CONFIGS, PAPER, QUICK, Bench

FOLDER = ROOT / "build/bench/cells"


def suite(args: argparse.Namespace, cells: Cells) -> list[str]:
    """All configs of the chosen methods on one small model. -> a line for each failure"""
    chosen = PAPER if args.suite == "paper" else QUICK
    chosen = dataclasses.replace(chosen, images=args.images or chosen.images, rounds=args.rounds or chosen.rounds)
    work = [(slug, config) for slug, config in CONFIGS[args.model] if slug in (args.method or [slug])]
    bench = Bench(args.model, chosen, cells)
    minutes = bench.estimate(work, not args.untimed) / 60
    print(f"{len(work)} configs, {chosen.images} images an arm: about {minutes:.0f} minutes of sampling", flush=True)

    def keep(slug: str, record: dict) -> None:
        if not args.untimed:
            records.write(slug, [record])
        show(record, slug)
    return bench.run(work, keep, not args.untimed)


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


def kernels() -> list[str]:
    """Each Triton kernel against its reference, or without a CUDA device what the compiler says of it."""
    if torch.cuda.is_available():
        for row in kernel_bench.measure():
            print(json.dumps(records.rounded(row)), flush=True)
        return []
    print("no CUDA device: kernels cannot be timed here; what they compile to ahead of time:", flush=True)
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "compile_kernels.py")])
    return ["kernels: see the problems in the table"] if done.returncode else []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", metavar="SLUG", help="only these methods")
    parser.add_argument("--model", choices=CONFIGS, default="dit")
    parser.add_argument("--suite", choices=("quick", "paper"), help="default: quick, unless another measurement is named")
    parser.add_argument("--images", type=int, help="images an arm, in place of the suite's")
    parser.add_argument("--untimed", action="store_true", help="only images, MACs and memory; writes no results")
    parser.add_argument("--realistic", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--catalog", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--rounds", type=int,
                        help="interleaved rounds, in place of the suite's, of 5 (--realistic) or 31 (--overhead)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, recorded with the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cells, failed = Cells(FOLDER), []
    if args.suite or not (args.realistic or args.overhead or args.catalog or args.kernels):
        failed += suite(args, cells)
    if args.realistic:
        failed += each_case(CASES, Realistic(cells, args.rounds or 5).record, args)
    if args.overhead:
        failed += each_case(SWITCHES, Realistic(cells, args.rounds or 31).overhead, args)
    if args.catalog:
        for n in (52, 500, 5000):
            print(json.dumps(catalog_bench.measure(n)), flush=True)
    if args.kernels:
        failed += kernels()
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
