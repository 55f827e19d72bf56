"""Whether a method's tests notice when its code is changed: each small change in turn, and the tests that must fail.

    python tools/mutate.py --method dbcache              # every change; `make mutate METHOD=dbcache`
    python tools/mutate.py --method toca --limit 60      # so many of them, drawn with a fixed seed

Changed is one number, comparison, sign or operator in the defaults of `Config` and in the functions; what is only said
(docstrings, messages, `explain`) is not. Survivors are printed with their line: a test is missing, or the change
makes no difference, which is then worth a word in the entry. `--write` puts the score into the entry's `fidelity`.
"""
from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from accel_tools.catalog import ROOT
from accel_tools.pages.text import write

SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.And: ast.Or,
         ast.Or: ast.And}
NAMES = {"max": "min", "min": "max", "any": "all", "all": "any"}
SECONDS = 300                      # after which a change counts as noticed: the tests hang


def changes(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """(line, what is changed, the module with that change), one after the other."""
    aside = {id(node) for part in said(tree) for node in ast.walk(part)}
    for number, node in enumerate(ast.walk(tree)):
        for what in _of(node) if id(node) not in aside else ():
            changed = copy.deepcopy(tree)
            _change(next(each for i, each in enumerate(ast.walk(changed)) if i == number), what)
            yield node.lineno, f"{ast.unparse(node)}: {what}", changed


def said(tree: ast.Module) -> Iterator[ast.AST]:
    """What only speaks, or is there for tests and searches: docstrings, messages, annotations, small settings."""
    aside = {"TINY", "TUNE", "ELSEWHERE", "__all__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "explain":
            yield node
        elif isinstance(node, ast.Assign) and any(isinstance(each, ast.Name) and each.id in aside for each in node.targets):
            yield node
        elif isinstance(node, ast.AnnAssign | ast.arg) and node.annotation:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns:
            yield node.returns


def _of(node: ast.AST) -> list[str]:
    """The changes that one node offers."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return ["one more"]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return ["the opposite"]
    if isinstance(node, ast.Compare):
        return [f"operator {i}" for i, each in enumerate(node.ops) if type(each) in SWAPS]
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
        return ["operator"]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        return ["sign"]
    return ["name"] if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES else []


def _change(node: ast.AST, what: str) -> None:
    if what == "one more":
        node.value = node.value + 1
    elif what == "the opposite":
        node.value = not node.value
    elif what == "operator":
        node.op = SWAPS[type(node.op)]()
    elif what == "sign" and isinstance(node.op, ast.Not):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif what == "sign":
        node.op = ast.UAdd()
    elif what == "name":
        node.func.id = NAMES[node.func.id]
    else:
        i = int(what.split()[1])
        node.ops[i] = SWAPS[type(node.ops[i])]()


def noticed(slug: str, changed: ast.Module, tests: str) -> bool:
    """Whether the tests fail in a process of its own, in which the method's module has been replaced."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            module = importlib.import_module(f"methods.{slug}")
            exec(compile(changed, module.__file__, "exec"), vars(module))
            status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "ignore", tests])
        except BaseException:
            status = 1
        os._exit(int(status != 0))
    return os.waitpid(child, 0)[1] != 0


def score(slug: str, limit: int | None) -> tuple[int, int, list[str]]:
    """(changes noticed, changes tried, those that were not)."""
    tests = str(ROOT / f"tests/methods/test_{slug}.py")
    tree = ast.parse((ROOT / f"methods/{slug}.py").read_text(encoding="utf-8"))
    if noticed(slug, tree, tests):
        raise RuntimeError(f"the tests of {slug} fail without any change")
    found = list(changes(tree))
    if limit is not None and limit < len(found):
        found = sorted(random.Random(0).sample(found, limit), key=lambda each: each[0])
    survivors, start = [], time.monotonic()
    for number, (line, what, changed) in enumerate(found, 1):
        if not noticed(slug, changed, tests):
            survivors.append(f"methods/{slug}.py:{line}: {what}")
        left = (time.monotonic() - start) / number * (len(found) - number)
        print(f"{number} of {len(found)}, {number - len(survivors)} noticed, {left / 60:.0f} minutes left", flush=True)
    return len(found) - len(survivors), len(found), survivors


def put(slug: str, killed: int, of: int) -> None:
    """Write the score into the entry's `fidelity`."""
    path = ROOT / f"catalog/entries/{slug}.yaml"
    text = re.sub(r"^  mutants: .*\n", "", path.read_text(encoding="utf-8"), flags=re.M)
    write(path, re.sub(r"^fidelity:\n", f"fidelity:\n  mutants: {{noticed: {killed}, of: {of}}}\n", text, flags=re.M))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", required=True, metavar="SLUG")
    parser.add_argument("--limit", type=int, help="so many changes of each method, drawn with a fixed seed")
    parser.add_argument("--write", action="store_true", help="put the score into the entry")
    args = parser.parse_args(argv)
    for slug in args.method:
        if not (ROOT / f"tests/methods/test_{slug}.py").exists():
            parser.error(f"there is no tests/methods/test_{slug}.py")
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for module in ("contracts.patch", "families"):                # imported once, for all the processes
        importlib.import_module(module)
    bad = 0
    for slug in args.method:
        killed, of, survivors = score(slug, args.limit)
        print("\n".join([*survivors, f"{slug}: {killed} of {of} changes noticed, {killed / of:.0%}"]), flush=True)
        if args.write:
            put(slug, killed, of)
        bad += killed / of < 0.9
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
