"""What every method does on your pipeline: who engages, with which setting, what it leaves out, and who refuses and why.

    python tools/check_pipe.py --pipe path/of/pipeline --prompt "a cat" --arguments '{"num_inference_steps": 6}'
    python tools/check_pipe.py --pipe my_module:make --dry

`my_module:make` is a function that returns (pipeline, arguments of its call), found as `import` finds it. Each method samples
once; `--dry` only puts them on and takes them off. The same in Python: `print(methods.check(pipe, lambda: pipe(...)))`.
"""
from __future__ import annotations

import argparse
import json
import sys

import torch

from accel_tools.catalog.citation import InputError
from accel_tools.new_family import pipeline
from methods._core.check import check


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipe", required=True, help="a folder that diffusers can load, or module:function")
    parser.add_argument("--prompt")
    parser.add_argument("--arguments", type=json.loads, default={}, help="further arguments of the call, as JSON")
    parser.add_argument("--dry", action="store_true", help="without sampling")
    args = parser.parse_args(argv)
    try:
        pipe, given = pipeline(args.pipe, args.prompt, args.arguments)
        pipe.set_progress_bar_config(disable=True)
        print(check(pipe, None if args.dry else lambda: pipe(**given, generator=torch.Generator().manual_seed(0))))
    except (InputError, TypeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
