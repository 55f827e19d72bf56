"""Run the bundled model plain and with every method that works on it, and show what each costs and saves.

`python tools/report.py` writes `build/report/index.html`: a picture of each run side by side, and a table with the
fewer-steps run of equal cost under every method; and `build/report/samples.png`, the same digits by each method, which the
site shows as `site/assets/samples.png`. An unchanged tree keeps its report.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import sys
from functools import partial
from pathlib import Path

import jinja2
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import methods
from accel_tools.arms import Arm, sample
from accel_tools.macs import count_macs, equal_cost_steps
from accel_tools.quality import psnr, quality, ssim
from accel_tools.render_readme import write
from accel_tools.sweep import CONFIGS
from accel_tools.timing import compare, interleave

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build/report"
STEPS, GUIDANCE, ROWS, ROUNDS = 20, 2.0, 2, 3
DIGITS = list(range(10)) * ROWS
ARMS: dict[str, dict] = {}                                 # the first configuration the bench has for each method
for _slug, _config in CONFIGS["dit"]:
    ARMS.setdefault(_slug, _config)


def state_of_the_code() -> str:
    """A hash of everything the report depends on."""
    files = [path for folder in ("methods", "kernels", "tools") for path in sorted((ROOT / folder).rglob("*"))
             if path.suffix in (".py", ".safetensors", ".j2") and path.is_file()]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def measure(pipe, arm: Arm) -> tuple[dict, Tensor]:
    """One arm: MACs an image, what the patch says it did, the judge's verdict, and the images."""
    with arm.applied(pipe) as patch:
        macs = count_macs(lambda: sample(pipe, arm.steps, [0], guidance=GUIDANCE))
        images = sample(pipe, arm.steps, DIGITS, guidance=GUIDANCE, batch=10)
        report = patch.report() if patch else {}
    return {"steps": arm.steps, "config": arm.config, "macs": macs, "report": report,
            "quality": quality(images, torch.tensor(DIGITS))}, images


def grid(images: Tensor) -> Image.Image:
    """Images (n, 1, H, W) in [0, 1] at twice their size in ten columns."""
    n, _, height, width = images.shape
    pixels = images.reshape(n // 10, 10, height, width).transpose(1, 2).reshape(n // 10 * height, 10 * width)
    return Image.fromarray((pixels * 255).round().byte().numpy()).resize((10 * width * 2, n // 10 * height * 2), 0)


def address(image: Image.Image) -> str:
    """A PNG as a data address, so that the page is one file."""
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def strip(rows: dict[str, Image.Image]) -> Image.Image:
    """One named row of digits for each run."""
    width, height = next(iter(rows.values())).size
    whole = Image.new("L", (width + 110, height * len(rows)), 255)
    for i, (name, row) in enumerate(rows.items()):
        whole.paste(row, (110, i * height))
        ImageDraw.Draw(whole).text((8, i * height + height // 3), name, fill=0, font=ImageFont.load_default(size=18))
    return whole


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="measure again although nothing changed")
    args = parser.parse_args(argv)
    key, stamp = state_of_the_code(), OUT / "state"
    if not args.force and stamp.exists() and stamp.read_text() == key:
        print(f"{OUT / 'index.html'} is up to date")
        return 0
    pipe = methods.tiny("dit")
    print(f"generating {len(DIGITS)} digits in {STEPS} steps, plain and with {len(ARMS)} methods", flush=True)
    sample(pipe, 2, [0], guidance=GUIDANCE)                                    # first calls are slow
    plain, base = measure(pipe, Arm(STEPS))
    plain |= {"name": "plain", "picture": address(grid(base))}
    rows, fewer, first, arms = [plain], {}, {"plain": grid(base[:10])}, {"plain": Arm(STEPS)}
    for number, (slug, config) in enumerate(ARMS.items(), 1):
        print(f"  {number}/{len(ARMS)} {slug}", flush=True)
        arm = Arm(STEPS, slug, config)
        row, images = measure(pipe, arm)
        first[slug] = grid(images[:10])
        steps = equal_cost_steps(row["macs"], plain["macs"], STEPS)
        arms |= {slug: arm, f"plain, {steps} steps": Arm(steps)}
        if steps not in fewer:
            fewer[steps] = measure(pipe, Arm(steps))
        for each, what in ((row, slug), (dict(fewer[steps][0]), f"plain, {steps} steps")):
            shown = images if each is row else fewer[steps][1]
            rows.append(each | {"name": what, "picture": address(grid(shown)),
                                "psnr": psnr(shown, base), "ssim": ssim(shown, base)})
    print(f"timing {len(arms)} runs in turn, {ROUNDS} rounds", flush=True)
    seconds = interleave({name: partial(sample, pipe, arm.steps, [3, 8], guidance=GUIDANCE) for name, arm in arms.items()},
                         ROUNDS, {name: partial(arm.applied, pipe) for name, arm in arms.items()})
    rows = [row | compare(seconds["plain"], seconds[row["name"]]) for row in rows]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    card = methods.card("dit")
    page = environment.get_template("report.html.j2").render(
        rows=rows, card=card, guidance=GUIDANCE, threads=torch.get_num_threads(), torch=torch.__version__, n=len(DIGITS),
        rounds=ROUNDS)
    OUT.mkdir(parents=True, exist_ok=True)
    strip(first).save(OUT / "samples.png", optimize=True)
    write(OUT / "index.html", page)
    write(OUT / "report.json", json.dumps([{k: v for k, v in row.items() if k != "picture"} for row in rows], indent=1))
    write(stamp, key)
    print(f"wrote {OUT / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
