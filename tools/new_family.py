"""Starts a new model family: two steps of a pipeline are watched, and its row and test are written if they prove it.

    python tools/new_family.py --name wan --pipe path/of/pipeline --prompt "a cat" --arguments '{"height": 256, "width": 384}'
    python tools/new_family.py --name wan --pipe my_module:make

`my_module:make` is a function that returns (pipeline, arguments of its call), found as `import` finds it, from here or by its
path in PYTHONPATH. Take a picture that is not square, and guidance as it is used. Nothing is overwritten, and nothing is
written unless every proof passes.
"""
from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from accel_tools.catalog import ROOT
from accel_tools.catalog.citation import InputError
from accel_tools.pages.text import environment, write
from methods._core.context import experts, split_target
from methods._core.families import families, find
from methods._core.guess import Guess, source, study

_env = environment()


def pipeline(where: str, prompt: str | None, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(pipeline, arguments of its call) from a folder or from `module:function`.

    Raises:
        InputError: neither; or the function does not return the two.
    """
    if Path(where).is_dir():
        pipe, given = DiffusionPipeline.from_pretrained(where), {}
    elif re.fullmatch(r"[\w.]+:\w+", where):
        module, _, name = where.partition(":")
        sys.path.insert(0, "")
        try:
            made = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise InputError(f"--pipe: {error}") from None
        finally:
            sys.path.remove("")
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], dict):
            raise InputError(f"--pipe: {where} must return (pipeline, arguments of its call)")
        pipe, given = made
    else:
        raise InputError(f"--pipe: {where} is neither a folder nor module:function")
    return pipe, given | ({"prompt": prompt} if prompt is not None else {}) | arguments


def name_problem(name: str, root: Path) -> str:
    """Why a family cannot be called that; "" if it can."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        return f"{name!r} must be lower-case words, joined by - or _"
    if name in {row.name for row in families().values()}:
        return f"there is a family {name}"
    there = [path for path in paths(name) if (root / path).exists()]
    return f"{', '.join(there)} exists" if there else ""


def paths(name: str) -> tuple[str, str]:
    """The files of the row and of its test."""
    file = name.replace("-", "_") + ".py"
    return f"methods/_core/families/{file}", f"tests/families/{file}"


def skeletons(found: Guess, name: str, pipe: Any) -> dict[str, str]:
    """Path from the root -> text of the two files."""
    row = found.row
    assert row is not None
    text = "\n".join(textwrap.wrap(f"FAMILY = {source(row)}", 128, subsequent_indent=" " * 16, break_long_words=False,
                                   break_on_hyphens=False))
    clock = row.clock.__name__
    values = {
        "name": name, "row": text, "grid": type(row.grid).__name__, "clock": clock if f"={clock}" in text else "",
        "model": found.model_class, "pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__,
        "proofs": [f"{proof}: {words}" for proof, (_, words) in found.proofs.items()],
    }
    return dict(zip(paths(name), (_env.get_template(each).render(values) for each in ("family.py.j2", "test_family.py.j2")),
                    strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the family, such as wan")
    parser.add_argument("--pipe", required=True, help="the folder of a pipeline, or module:function")
    parser.add_argument("--prompt", help="what the pipeline is called with")
    parser.add_argument("--arguments", type=json.loads, default={}, help="further arguments of its call, as JSON")
    parser.add_argument("--device", help="where the pipeline runs; left out, where it is")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if reason := name_problem(args.name, args.root):
            raise InputError(f"--name: {reason}")
        pipe, arguments = pipeline(args.pipe, args.prompt, args.arguments)
        if args.device:
            pipe.to(args.device)
        model = split_target(experts(pipe)[0])[1]
        if (row := find(type(model))) is not None:
            raise InputError(f"--pipe: {type(model).__name__} has a row, {row.name}")
        arguments = {"num_inference_steps": 2, "output_type": "latent"} | arguments

        def run() -> None:
            pipe(**{"generator": torch.Generator().manual_seed(0)} | arguments)

        found = study(pipe, run, args.name, lambda words: print(f"{words} ...", file=sys.stderr))
        print(found.text())
        if not found.proved:
            raise InputError("not everything is proved: write the row by hand (site/guide/families.md)")
    except (InputError, OSError, TypeError) as error:
        print(error, file=sys.stderr)
        print("nothing written", file=sys.stderr)
        return 1
    for path, text in skeletons(found, args.name, pipe).items():
        write(args.root / path, text)
        print(f"written: {path}")
    print("next: fill in what is marked FILL, then pytest tests/test_families.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
