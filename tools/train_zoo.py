"""Train a model of the zoo on real images: `python tools/train_zoo.py dit`; judges come first, they score the others.

Runs on a CPU in one to two hours or on a GPU unchanged. It writes a checkpoint every few hundred steps to
`build/zoo/<name>.ckpt` and continues exactly where it stopped when called again (the checkpoint holds weights, averages,
optimiser and random state). At the end it writes `methods/_zoo/<name>.safetensors` (fp16), the card `<name>.json` with what
the judge says of 500 images, and a sheet of samples, `site/assets/models/<name>.png`.

`python tools/train_zoo.py --method dydit [name]` trains a method of kind training, compress or module on the digits in the
same way and writes `methods/_trained/<name>.safetensors` and its card. The module of the method says all that is needed:

    TRAINED = {"dydit-50": Config(target=0.5)}           # what is trained: names of files, and the Config of each
    def training(pipe, config) -> Iterator[Stage]        # yields methods._core.learning.Stage, one after the other
    RIVALS = {"dydit-50": {"fixed share": Config(...)}}  # what it is held against, trained alike but not shipped (optional)
    def metrics(model, images, labels) -> dict           # of `build(config)` with the weights, on held-out digits; a method
                                                         # with `convert` or `compress` needs none: its samples are judged
                                                         # beside plain ones

`pipe` is `methods.tiny("dit")`. Of the model of the last stage the parameters with `requires_grad` are kept.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accel_tools.measure import trained
from accel_tools.measure.records import rounded
from accel_tools.measure.tasks import TASKS
from accel_tools.zoo.pictures import row, sheet
from accel_tools.zoo.recipes import ar, dit, emoji, judges, video
from accel_tools.zoo.training import ROOT, Trained, write_card
from methods._zoo import card

PICTURES = ROOT / "site/assets/models"
RECIPES: dict[str, Callable[[int, float], Trained]] = {
    "judge": judges.train_digit_judge, "emoji_judge": judges.train_emoji_judge, "video_judge": judges.train_video_judge,
    "dit": dit.train_dit, "unet": emoji.train_unet, "mmdit": emoji.train_mmdit, "video_dit": video.train_video,
    "ar": ar.train_ar}


def scored(name: str, n: int, steps: int | None, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """What the judge says of `n` images of a trained model by its plain run of `steps` steps, and the images."""
    task = TASKS[name]
    pipe, prompts = task.load(), task.prompts(n)
    arm = task.plain("sjd" if "decoder" in task.kinds else None)
    steps = arm.steps and steps
    with arm.applied(pipe):
        images = task.sample(pipe, steps, prompts, seed=seed)
    how = "one pass a token" if steps is None else f"{type(pipe.scheduler).__name__}, {steps} steps"
    return rounded({"sampler": f"{how}, guidance {task.guidance}, seed {seed}", **task.quality(images, prompts),
                    "frechet_real_vs_real": task.real_frechet(n)["frechet"]}), images


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(RECIPES)}; with --method, one of its TRAINED, else all")
    parser.add_argument("--method", metavar="SLUG", help="train this method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--images", type=int, default=500, help="how many the judge sees")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler that draws them")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    command = " ".join(["python tools/train_zoo.py", *(argv or sys.argv[1:])])
    try:
        known = trained.names(args.method) if args.method else list(RECIPES)
    except (ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))
    if args.name not in known and not (args.method and args.name is None):
        parser.error(f"name {args.name!r} is none of {', '.join(known)}")
    if args.method:
        for name in [args.name] if args.name else known:
            made = trained.train_method(args.method, name, args.seed, args.scale, command)
            made["metrics"] = trained.metrics(args.method, name, args.images, args.seed, args.scale)
            trained.write(made)
            print(made["metrics"])
        return 0
    RECIPES[args.name](args.seed, args.scale).write(args.name, args.seed)
    if args.name in TASKS:
        print(f"sampling {args.images} images for the judge", flush=True)
        metrics, images = scored(args.name, args.images, args.steps)
        write_card(args.name, card(args.name) | {"command": command, "metrics": metrics})
        PICTURES.mkdir(parents=True, exist_ok=True)
        rows = images[:60].split(10) if images.ndim == 4 else images[:8]          # of a clip its frames
        sheet([row(each) for each in rows]).save(PICTURES / f"{args.name}.png", optimize=True)
        print(metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
