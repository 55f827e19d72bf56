"""Checks the catalogue, the code that belongs to it, and the files generated from it.

    python tools/check_catalog.py [--fix] [--format text|github|json]

Source is read by AST; nothing of the library is imported. Exit status 1 if there is an error; warnings do not count.
"""
from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

from accel_tools.catalog import ROOT, read
from accel_tools.catalog.code_rules import code_problems
from accel_tools.catalog.papers import twins
from accel_tools.catalog.rows import erratum_problems
from accel_tools.catalog.yaml_lines import Problem
from accel_tools.pages.lists import MarkerError, generated, stale
from accel_tools.pages.text import write


def check(root: Path = ROOT, fix: bool = False) -> tuple[list[Problem], list[str]]:
    """All problems, and the generated files that were re-rendered (only with `fix`, only when entries are sound)."""
    collecting = gc.isenabled()
    gc.disable()                       # nothing here makes cycles; collecting would take half of the time
    try:
        return _check(root, fix)
    finally:
        if collecting:
            gc.enable()


def _check(root: Path, fix: bool) -> tuple[list[Problem], list[str]]:
    reading = read(root)
    problems, fixed = list(reading.problems), []
    if not problems:
        problems += erratum_problems(reading.catalog)
    if not problems:
        try:
            changed = stale(root, generated(reading.catalog))
        except MarkerError as error:
            changed = {}
            problems.append(Problem("README.md", 1, str(error)))
        for file, (_, text) in changed.items():
            if fix:
                write(root / file, text)
                fixed.append(file)
            else:
                problems.append(Problem(file, 1, "is stale; run tools/check_catalog.py --fix"))
    if reading.catalog:
        problems += twins(reading.catalog)
    return sorted([*problems, *code_problems(reading)]), fixed


def show(problems: list[Problem], form: str) -> str:
    if form == "json":
        return json.dumps([problem._asdict() for problem in problems], indent=1, ensure_ascii=False)
    if form == "github":
        return "\n".join(f"::{p.level} file={_property(p.file)},line={p.line}::{_escape(p.message)}" for p in problems)
    return "\n".join(f"{p.file}:{p.line}: {'warning: ' * (p.level == 'warning')}{p.message}" for p in problems)


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escape(text).replace(":", "%3A").replace(",", "%2C")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="re-render the generated files; changes nothing else")
    parser.add_argument("--format", choices=("text", "github", "json"), default="text")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    problems, fixed = check(args.root, args.fix)
    errors = sum(problem.level == "error" for problem in problems)
    if problems or args.format == "json":
        print(show(problems, args.format))
    if args.format == "text":
        for file in fixed:
            print(f"re-rendered {file}")
        print(f"{errors} errors, {len(problems) - errors} warnings")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
