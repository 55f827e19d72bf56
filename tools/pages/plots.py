"""Plots of what was measured, as SVG text: quality against speed, speed against its MAC bound, and peak memory.

    figures(measured("dit", results, baseline, names))["pareto-frechet"]

The same numbers give the same bytes. Text stays text and takes the colour of the page around it, as lines and axes do, so a
plot set into a page reads on light and on dark. Every axis begins at zero, but for the logarithmic one of Frechet distances.
Methods that lose to fewer steps are drawn pale and say their name where one points at them.
"""
from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from accel_tools.pages.measured import SCORES, Measured, Run
from accel_tools.pages.verdict import verdict

INK, OURS, PEER = "#010203", "#2f86d1", "#d9762b"         # INK becomes currentColor; the others read on white and on black
SIZE = (5.2, 3.6)                                          # of a plot, in inches of 72 points
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK,
         "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
         "axes.linewidth": 0.8, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold"}
MARKS = {"method": dict(marker="o", color=OURS, markersize=7), "peer": dict(marker="D", color=PEER, markersize=6.5),
         "plain": dict(marker="s", color=INK, markersize=6), "fewer": dict(marker=".", color=INK, markersize=7)}


def figures(found: Measured) -> dict[str, str]:
    """Every plot the numbers of one model allow: name -> SVG."""
    timed = [run for run in found.runs if run.arm.get("speedup") and run.kind != "plain"]
    made = {}
    wanted = [("frechet", "Fréchet distance", "lower"), ("psnr", "PSNR to the plain image", "dB, higher")]
    if found.score:
        wanted.insert(0, (found.score, SCORES[found.score], "higher"))
    for key, axis, better in wanted:
        if any(_finite(run.arm.get(key)) for run in timed):
            made[f"pareto-{key}"] = _svg(found, f"{axis} against speed", lambda axes, k=key, a=axis, b=better:
                                         _pareto(axes, found, k, f"{a} ({b} is better)"))
    if any(run.bound for run in timed):
        made["bound"] = _svg(found, "Speed-up against what the arithmetic allows", lambda axes: _bound(axes, found, timed))
    heavy = [run for run in found.of("plain", "method", "peer") if run.arm.get("peak_bytes")]
    if heavy:
        made["memory"] = _svg(found, "Peak memory of a run", lambda axes: _memory(axes, heavy), rows=len(heavy))
    return made


def _finite(value: float | None) -> bool:
    """Whether a plot can show it; images that are equal to the plain ones are at an infinite PSNR."""
    return value is not None and math.isfinite(value)


# ---- the plots -----------------------------------------------------------------------------------------------------------

def _pareto(axes: Axes, found: Measured, key: str, label: str) -> None:
    """Quality over measured speed-up: a method is worth its trouble on the better side of the line of fewer steps."""
    runs = [run for run in found.runs if _finite(run.arm.get(key)) and (run.kind == "plain" or run.arm.get("speedup"))]
    at = {id(run): (1.0 if run.kind == "plain" else run.arm["speedup"], run.arm[key]) for run in runs}
    line = sorted(at[id(run)] for run in runs if run.kind in ("plain", "fewer"))
    axes.plot(*zip(*line, strict=True), color=INK, linewidth=1, alpha=.7)
    for run in runs:
        _mark(axes, run, *at[id(run)], pale=_loses(found, run))
    heights = [y for _, y in at.values()]
    real = found.real.get("frechet") if key == "frechet" else None
    if key == "frechet":                                           # a ruined image is a hundred times as far as a good one
        axes.set_yscale("log")
        shown = [*heights, real] if real else heights
        axes.set_ylim(min(shown) / 2, 2 * max(shown))
    else:
        axes.set_ylim(0, 1.05 if key in SCORES else 1.18 * max(heights))
    axes.set_xlim(0, 1.32 * max(x for x, _ in at.values()))
    if found.noise:
        axes.axvspan(*found.noise, color=INK, alpha=.12, linewidth=0)
    if real:
        axes.axhline(real, color=INK, linewidth=.8, linestyle=(0, (4, 3)))
        axes.annotate("real against real", (0, real), xytext=(3, 3), textcoords="offset points", fontsize=8.5)
    axes.set_xlabel("measured speed-up over the plain run")
    axes.set_ylabel(label)
    _name(axes, [(*at[id(run)], run) for run in runs if not _loses(found, run)], list(at.values()))


def _bound(axes: Axes, found: Measured, runs: Sequence[Run]) -> None:
    """Measured speed-up over the ratio of multiply-accumulates; on the diagonal all saved work is saved time."""
    runs = [run for run in runs if run.bound]
    far = 1.25 * max(max(run.bound, run.arm["speedup"]) for run in runs)
    axes.plot([0, far], [0, far], color=INK, linewidth=.8, linestyle=(0, (4, 3)))
    axes.annotate("all of it", (far * .93, far * .93), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8.5)
    for run in runs:
        _mark(axes, run, run.bound, run.arm["speedup"], upright=True, pale=_loses(found, run))
    axes.set_xlim(0, far)
    axes.set_ylim(0, far)
    if found.noise:
        axes.axhspan(*found.noise, color=INK, alpha=.12, linewidth=0)
    axes.set_xlabel("plain MACs / MACs of the run")
    axes.set_ylabel("measured speed-up")
    _name(axes, [(run.bound, run.arm["speedup"], run) for run in runs if run.kind != "fewer" and not _loses(found, run)],
          [(run.bound, run.arm["speedup"]) for run in runs])


def _memory(axes: Axes, runs: Sequence[Run]) -> None:
    """Bars of the most bytes held at a time, the part the method itself caches in a stronger tone."""
    scale, unit = (2 ** 30, "GiB") if max(run.arm["peak_bytes"] for run in runs) >= 2 ** 30 else (2 ** 20, "MiB")
    for row, run in enumerate(runs):
        peak, cached = run.arm["peak_bytes"] / scale, min(run.arm.get("cached_bytes") or 0, run.arm["peak_bytes"]) / scale
        colour = MARKS[run.kind]["color"]
        axes.barh(row, peak, .62, color=colour, alpha=.45, linewidth=0)
        axes.barh(row, cached, .62, color=colour, linewidth=0)
        axes.annotate(f"{peak:.3g} {unit}" + (f", {cached:.3g} cached" if cached else ""), (peak, row), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(runs)), [_short(run) for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 2.1 * max(run.arm["peak_bytes"] for run in runs) / scale)               # room for the longest label
    axes.set_xlabel(f"peak memory ({unit})")
    axes.tick_params(axis="y", length=0)


# ---- how they are drawn --------------------------------------------------------------------------------------------------

def _loses(found: Measured, run: Run) -> bool:
    said = verdict(found, run)
    return said is not None and said.word == "loses"


def _mark(axes: Axes, run: Run, x: float, y: float, upright: bool = False, pale: bool = False) -> None:
    """A point with the quartiles of its speed-up as a thin line; hollow where the code has changed since."""
    style, strength = MARKS[run.kind], .4 if pale else 1
    if spread := run.arm.get("speedup_spread"):
        axes.plot([x, x] if upright else spread, spread if upright else [y, y], color=style["color"], linewidth=1.2,
                  alpha=.6 * strength, gid=_group(run))
    axes.plot([x], [y], linestyle="", fillstyle="none" if run.stale else "full", gid=_group(run), alpha=strength, **style)


def _group(run: Run) -> str:
    """What an element belongs to: the method, and its name, which a reader sees where they point at it."""
    return f"run-{run.slug or run.kind} {_short(run)}"


def highlighted(plot: str, slug: str) -> str:
    """A plot in which the marks and the names of one method are of the class "here", and those of all others are "run"."""
    return plot.replace(f'<g class="run run-{slug}"', '<g class="here"')


def _short(run: Run) -> str:
    """A label that fits into a plot."""
    if run.kind == "plain":
        return "plain"
    settings = [f"{value:g}" if isinstance(value, int | float) else str(value) for value in run.config.values()
                if not isinstance(value, bool | list | tuple | dict)]
    return " ".join([run.name, *settings[:2]])


def _name(axes: Axes, labels: list[tuple[float, float, Run]], points: list[tuple[float, float]],
          size: float = 8.5) -> None:
    """Each label right of its point, or lower or higher where a label or one of `points` is in the way, with a thin line; none
    where there is no room at all, since the table below names every run."""
    axes.figure.draw_without_rendering()
    axes.figure.set_layout_engine("none")                          # nothing moves any more: labels are placed by this

    def free(box: tuple[float, ...], others: list[tuple[float, ...]]) -> bool:
        return not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in others)

    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in map(axes.transData.transform, points)]
    floor, ceiling = axes.bbox.y0, axes.bbox.y1
    for x, y, run in sorted(labels, key=lambda label: (-label[1], label[0], label[2].label)):
        left, middle = axes.transData.transform((x, y))
        width, height = .56 * size * len(_short(run)), 1.2 * size
        boxes = {move: (left + 7, middle + move - height / 2, left + 7 + width, middle + move + height / 2)
                 for step in range(14) for move in (-step * height, step * height)}
        inside = {move: box for move, box in boxes.items() if floor < box[1] and box[3] < ceiling}
        moved = next((move for move, box in inside.items() if free(box, taken)), None)
        if moved is None:
            continue
        taken.append(boxes[moved])
        line = dict(arrowstyle="-", color=INK, linewidth=.5, alpha=.5, shrinkA=0, shrinkB=3) if moved else None
        axes.annotate(_short(run), (x, y), xytext=(7, moved), textcoords="offset points", va="center", fontsize=size,
                      arrowprops=line, gid=_group(run))


def _svg(found: Measured, title: str, draw: Callable[[Axes], None], rows: int = 0) -> str:
    """The SVG of one plot, without what would differ from run to run or from host to host."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{found.model} {title}"}):
        figure = Figure(figsize=(SIZE[0], max(1.1 + .28 * rows, 1.6) if rows else SIZE[1]), dpi=72, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        axes.grid(color=INK, alpha=.12, linewidth=.6)
        axes.set_axisbelow(True)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg"):].replace(INK, "currentColor")
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"\s*<style.*?</style>", "", text, flags=re.S)         # it would hold for the whole page
    text = re.sub(r'<g id="(run-\w+) ([^"]*)">', r'<g class="run \1"><title>\2</title>', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)                           # ids that every plot of a page would repeat
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
                  rf'<svg class="plot" viewBox="\1" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}">',
                  text, count=1)
    return re.sub(r"\n\s*", "\n", text).replace("xlink:href", "href").strip() + "\n"
