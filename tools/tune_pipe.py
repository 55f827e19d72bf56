"""The fastest recipe of methods, settings and steps on your pipeline within a budget of loss, beside fewer steps alone.

    python tools/tune_pipe.py --pipe path/of/pipeline --prompts prompts.txt --steps 28 --budget "psnr>=30" --out tuned.json
    python tools/tune_pipe.py --pipe my_module:make --prompts prompts.txt --steps 28 --budget "speedup>=2" --out tuned.json
    python tools/tune_pipe.py --zoo dit mmdit            # the bundled models, into catalog/tuned

`my_module:make` is a function that returns (pipeline, arguments of its call), found as `import` finds it; `prompts.txt` has a
prompt a line, at least two. Beside `tuned.json` lie its journal, from which a search that was killed goes on, and a picture of
what was found; `methods.load(pipe, "tuned.json")` puts it on. In Python: `print(methods.tune(pipe, prompts, steps=28))`.
"""
from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from accel_tools.catalog import ROOT
from accel_tools.catalog.citation import InputError
from accel_tools.measure import records
from accel_tools.measure.tasks import TASKS, bundled
from accel_tools.new_family import pipeline
from accel_tools.pages import text
from methods._core.tune import Point, Tuned, tune

EACH, CALLS = 4, 4                        # images of a call and calls of a search on a bundled model


def picture(tuned: Tuned, path: Path) -> None:
    """Speed against likeness as SVG: all that was tried, the line of fewer steps, names along the frontier."""
    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    ran = [point for point in tuned.points if point.state == "engaged"]
    fewer = sorted((point.speedup, point.psnr) for point in ran if not point.recipe.patches)
    axes.plot(*zip((1.0, max(point.psnr for point in ran) + 3), *fewer, strict=True), "s-", color="black", markersize=4,
              label="fewer steps")
    methods = [(point.speedup, point.psnr) for point in ran if point.recipe.patches]
    axes.plot([speedup for speedup, _ in methods], [psnr for _, psnr in methods], "o", color="grey", markersize=3, alpha=.5,
              label="methods")
    for point in tuned.frontier:
        if point.recipe.patches:
            axes.annotate(str(point.recipe), (point.speedup, point.psnr), fontsize=7)
    axes.set(title=f"{tuned.model}, {tuned.plain}, {tuned.budget}: {tuned.best.recipe}", xlabel="speed-up",
             ylabel="PSNR to plain (dB)")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def zoo(model: str, budget: str, methods: Sequence[str] | None) -> None:
    """Tune a bundled model and write catalog/tuned/<model>.json."""
    task = TASKS[model]
    pipe = task.load()
    pipe.set_progress_bar_config(disable=True)
    first = next(iter(inspect.signature(pipe.__call__).parameters))
    given = {"guidance_scale": task.guidance, **dict(task.settings)}
    calls = [{first: task.prompts(EACH, EACH * number), **given} for number in range(CALLS)]
    tuned = tune(pipe, calls, steps=task.steps, budget=budget, methods=methods)
    print(tuned)
    found = {"model": model, "budget": budget, "steps": task.steps, "images": EACH * CALLS // 2, "best": row(tuned.best),
             "fewer_steps": [row(point) for point in tuned.rivals], "frontier": [row(point) for point in tuned.frontier],
             "tried": len(tuned.points), **records.provenance()}
    text.write(ROOT / f"catalog/tuned/{model}.json", json.dumps(records.rounded(found), indent=1) + "\n")


def row(point: Point) -> dict[str, Any]:
    return {"steps": point.recipe.steps, "patches": [[slug, json.loads(config)] for slug, config in point.recipe.patches],
            "speedup": point.speedup, "psnr": point.psnr}


def calls_of(prompts: Path, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a call for each line of a file."""
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts: {error}") from None
    return [{**given, "prompt": line} for line in lines if line]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipe", help="a folder that diffusers can load, or module:function")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line")
    parser.add_argument("--arguments", type=json.loads, default={}, help="further arguments of the call, as JSON")
    parser.add_argument("--steps", type=int, default=28, help="of the plain run")
    parser.add_argument("--budget", default="psnr>=30", help='"psnr>=30" in dB or "speedup>=2"')
    parser.add_argument("--method", nargs="+", metavar="SLUG", help="only these methods")
    parser.add_argument("--out", type=Path, default=Path("tuned.json"))
    parser.add_argument("--zoo", nargs="+", choices=[name for name in bundled() if TASKS[name].steps], metavar="MODEL")
    args = parser.parse_args(argv)
    if not args.zoo and not (args.pipe and args.prompts):
        parser.error("say --pipe and --prompts, or --zoo")
    if args.zoo and (reason := records.dirty_tree()):
        parser.error(reason.partition(", or say")[0])
    if args.zoo:
        torch.set_num_threads(1)
    try:
        for model in args.zoo or ():
            zoo(model, args.budget, args.method)
        if args.pipe:
            pipe, given = pipeline(args.pipe, None, args.arguments)
            pipe.set_progress_bar_config(disable=True)
            tuned = tune(pipe, calls_of(args.prompts, given), steps=args.steps, budget=args.budget, methods=args.method,
                         journal=args.out.with_suffix(".jsonl"))
            tuned.save(args.out)
            picture(tuned, args.out.with_suffix(".svg"))
            print(tuned)
            print(f"written: {args.out}, {args.out.with_suffix('.svg')}; put on by methods.load(pipe, {str(args.out)!r})")
    except (InputError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
