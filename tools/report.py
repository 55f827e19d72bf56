"""Run the bundled models plain, with fewer steps and with the methods, and show what each costs and saves.

`python tools/report.py` writes `build/report/index.html`, one page with pictures side by side, a plot and a table for each
model, and `build/report/samples.png`, colour images plain, in fewer steps and by the methods that save most of those that
stay close to the plain ones, which the site shows as `site/assets/samples.png`. `build/report/methods/<slug>.png` are the
pictures of the methods' pages, `site/assets/methods`, with those of methods that edit or that convert a model. Each method
runs on one model, if it can on the one its paper is about. An unchanged tree keeps its report, and a changed one measures only
what changed anew; the bench measures with more images and more care.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from typing import Any

import torch
from PIL import Image

from accel_tools.catalog import ROOT, Catalog, load
from accel_tools.measure.arms import Arm, offering
from accel_tools.measure.cells import Cells
from accel_tools.measure.records import provenance
from accel_tools.measure.stable_flow import draw, pairs
from accel_tools.measure.sweep import Bench, Suite, Work, work
from accel_tools.measure.tasks import TASKS, bundled
from accel_tools.measure.trained import drop_in
from accel_tools.pages.measured import SCORES, Measured, Run, allowed
from accel_tools.pages.plots import figures
from accel_tools.pages.text import environment, write
from accel_tools.pages.verdict import verdict
from accel_tools.pages.views import with_parents
from accel_tools.zoo.pictures import address, frames, named, row, strip
from methods._trained import weights_card

OUT = ROOT / "build/report"
SUITE = Suite("report", images=8, rounds=2, seeds=(0,))
CURVE = (10, 5)                                            # fewer steps that the plain model also takes
MORE = 4                                                   # how much stronger differences are shown than they are
SHOWN, CLOSE = 4, 25.0                                     # methods among the samples, and dB to the plain images at least


def state_of_the_code() -> str:
    """A hash of everything the report depends on."""
    folders = ("methods", "kernels", "tools", "catalog/entries")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))
             if path.suffix in (".py", ".safetensors", ".j2", ".yaml") and path.is_file()]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def homes(catalog: Catalog, benches: dict[str, Bench]) -> dict[str, list[Work]]:
    """Model -> the methods shown on it, each with the first config measured there.

    A method goes where its paper's models lead, else where its entry has it measured, else to the first model that takes it.
    """
    found: dict[str, list[Work]] = {model: [] for model in benches}
    for slug, entry in catalog.entries.items():
        papers = [term.replace("-", "_") for term in with_parents(catalog, "model", entry.models)]
        for model in dict.fromkeys([*papers, *entry.bench, *benches]):
            first = work(catalog, model, [slug])[:1] if model in benches else []
            if first and benches[model].refusal(*first[0]) is None:
                found[model] += first
                break
    return found


def measure(bench: Bench, methods: list[Work], names: dict[str, str]) -> dict[str, Any]:
    """What the page shows of one model: its runs with their pictures, the plots, and what failed."""
    task, failed = bench.task, []
    arms: dict[str, tuple[Run, Arm]] = {}
    plain = task.plain(methods[0][0] if methods else None)
    arms["plain"] = Run("plain", "plain", {}), plain
    arms |= {f"{steps}": (Run("fewer", f"{steps} steps", {}), Arm(steps)) for steps in task.curve}
    arms |= {slug: (Run("method", names[slug], {}, config, slug), Arm(task.steps, slug, config)) for slug, config in methods}
    for name, (run, arm) in list(arms.items()):
        print(f"  {run.name}", flush=True)
        try:
            bench.images(arm, 0), bench.macs(arm)
        except Exception as error:                                  # its traceback is among the cells
            failed.append(f"{run.name}: {error}".splitlines()[0])
            del arms[name]
    print(f"  timing {len(arms)} runs in turn, {bench.suite.rounds} rounds", flush=True)
    seconds = bench.seconds({name: arm for name, (_, arm) in arms.items()})
    runs = []
    for name, (run, arm) in arms.items():
        numbers = {**bench.length(arm), "macs": bench.macs(arm), **bench.quality(arm, plain), **seconds[name]}
        runs.append(dataclasses.replace(run, arm=numbers, bound=allowed({"macs": bench.macs(plain)}, numbers)))
    found = Measured(task.model, runs, tuple(runs[0].arm["speedup_spread"]))
    plots, wanted = figures(found), ("pareto-psnr", "bound") if task.paired else (f"pareto-{task.score}",)
    return {"model": task.model, "title": task.title, "runs": runs, "failed": failed, "score": SCORES[task.score].lower(),
            "key": task.score, "said": [verdict(found, run) for run in runs],
            "plots": [plots[name] for name in plots if name in wanted], "no_fewer": task.no_fewer_steps,
            "pictures": [pictures(bench, arm) for _, arm in arms.values()], "asked": bench.prompts(0),
            "images": [bench.images(arm, 0) for _, arm in arms.values()]}


def pictures(bench: Bench, arm: Arm) -> dict[str, str]:
    """Addresses of an arm's images, `moving` and `still` where they are clips."""
    images = bench.images(arm, 0)
    if images.ndim == 4:
        return {"still": address(row(images))}
    return {"moving": address(*frames(images)), "still": address(strip(images))}


def strips(section: dict[str, Any]) -> dict[str, Image.Image]:
    """Of each method of a model: its images below the plain ones and those of the fewer steps that cost about as much, and how
    far it moved them. slug -> picture"""
    drawn = list(zip(section["runs"], section["images"], strict=True))
    plain, fewer = drawn[0][1], [each for each in drawn if each[0].kind == "fewer"]
    found = {}
    for run, images in drawn:
        if run.kind == "method":
            near = min(fewer, key=lambda each: abs(each[0].arm["macs"] - run.arm["macs"]), default=None)
            rows = {"plain": plain, **({near[0].name: near[1]} if near else {}), run.name: images}
            if images.shape == plain.shape and run.arm.get("psnr"):
                rows[f"difference x {MORE}"] = (images - plain).abs() * MORE
            found[run.slug] = named({name: row(each) if each.ndim == 4 else strip(each) for name, each in rows.items()})
    return found


def edits(catalog: Catalog, benches: dict[str, Bench]) -> dict[str, Image.Image]:
    """Of each method that edits beside an original: originals, and edits drawn plain and by the method. slug -> picture"""
    def drawn(bench: Bench, arm: Arm) -> torch.Tensor:
        """(n, 2, C, H, W): of each pair of prompts the original and its edit."""
        def all_pairs() -> torch.Tensor:
            with arm.applied(bench.pipe):
                return torch.stack([draw(bench.task, bench.pipe, pair, seed) for seed, pair in enumerate(asked)])
        return bench.cells.tensor(bench.identity("edits", arm, n=len(asked)), all_pairs)

    found, asked = {}, pairs()[:SUITE.images]
    for slug in offering("PROMPTS"):
        entry = catalog.entries[slug]
        if model := next((model for model in entry.bench if model in benches), None):
            bench = benches[model]
            plain, by = (drawn(bench, arm) for arm in (bench.plain, Arm(bench.task.steps, slug, entry.bench[model][0])))
            found[slug] = named({"original": row(plain[:, 0]), "edit, plain": row(plain[:, 1]),
                                 f"by {entry.name}": row(by[:, 1])})
    return found


def converted(catalog: Catalog, bench: Bench) -> dict[str, Image.Image]:
    """Of each method that converts the bundled DiT: its digits below the plain ones. slug -> picture"""
    found, plain = {}, bench.images(bench.plain, 0)
    for slug, module in offering("TRAINED").items():
        if hasattr(module, "convert") or hasattr(module, "compress"):
            name = next(iter(module.TRAINED))

            def sample(module=module, name=name) -> torch.Tensor:
                pipe = bench.task.load()
                pipe.transformer = drop_in(module, name)
                return bench.task.sample(pipe, bench.task.steps, bench.prompts(0))
            identity = bench.identity("converted", bench.plain, weights_of=weights_card(name)["sha256"], n=SUITE.images)
            images = bench.cells.tensor(identity, sample)
            found[slug] = named({"plain": row(plain), catalog.entries[slug].name: row(images),
                                 f"difference x {MORE}": row((images - plain).abs() * MORE)})
    return found


def samples(sections: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Images of the model with most methods, of those that draw in colour if there are any: what to call them -> images."""
    colour = [each for each in sections if each["images"][0].shape[-3] == 3] or sections
    section = max(colour, key=lambda each: len(each["runs"]))
    drawn = list(zip(section["runs"], section["images"], strict=True))
    close = [(run, images) for run, images in drawn
             if run.kind == "method" and run.bound and run.arm.get("psnr", 0.0) >= CLOSE]
    fewer = [each for each in drawn if each[0].kind == "fewer"][:1]
    best = sorted(close, key=lambda each: -each[0].bound)[:SHOWN]
    return {f"{run.name}\n{1 / run.bound:.0%} of the work" if run.bound else run.name: images
            for run, images in (drawn[0], *fewer, *best)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="measure again although nothing changed")
    parser.add_argument("--model", nargs="+", choices=TASKS, default=bundled(), metavar="MODEL", help="only these")
    args = parser.parse_args(argv)
    key, stamp = state_of_the_code() + " ".join(args.model), OUT / "state"
    if not args.force and stamp.exists() and stamp.read_text() == key:
        print(f"{OUT / 'index.html'} is up to date")
        return 0
    start, catalog, cells = time.monotonic(), load(), Cells(OUT / "cells")
    if args.force:
        for path in cells.folder.glob("*"):
            path.unlink()
    benches = {}
    for model in args.model:
        task = TASKS[model]
        benches[model] = Bench(dataclasses.replace(task, timed=1, curve=CURVE if task.curve else ()), SUITE, cells)
    sections, names = [], {slug: entry.name for slug, entry in catalog.entries.items()}
    for model, methods in homes(catalog, benches).items():
        print(f"{model}: {len(methods)} methods", flush=True)
        if methods or benches[model].task.curve:
            sections.append(measure(benches[model], methods, names))
    page = environment(autoescape=True).get_template("report.html.j2").render(
        sections=sections, threads=torch.get_num_threads(), torch=torch.__version__, suite=SUITE, infinity=math.inf,
        ran=sum(run.kind == "method" for each in sections for run in each["runs"]),
        broke=sum(len(each["failed"]) for each in sections), **provenance())
    write(OUT / "index.html", page)
    if sections:
        named({name: row(images) for name, images in samples(sections).items()}).save(OUT / "samples.png", optimize=True)
    (OUT / "methods").mkdir(parents=True, exist_ok=True)
    shown = {slug: picture for section in sections for slug, picture in strips(section).items()} | edits(catalog, benches)
    if "dit" in benches:
        shown |= converted(catalog, benches["dit"])
    for slug, picture in shown.items():
        picture.save(OUT / f"methods/{slug}.png", optimize=True)
    write(OUT / "report.json", json.dumps({each["model"]: [{"name": run.label, **run.arm} for run in each["runs"]]
                                           for each in sections}, indent=1))
    write(stamp, key)
    print(f"wrote {OUT / 'index.html'} after {time.monotonic() - start:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
