"""catalog/pairs.json says which two patches stack on which model family, and why others do not. It is derived here, by trying.

`pytest tests/test_pairs.py --update` writes it anew, with `--method SLUG` the pairs of one method. A pair that stacks must then
show what a single method shows: both engage, either order gives the same result, a second run equals a fresh one, and either
comes off first.
"""
import importlib
import itertools
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, FIRST

pytestmark = pytest.mark.slow

PAIRS = Path(__file__).parents[1] / "catalog/pairs.json"
STEPS = 9                     # five evaluations of pfdiff, of which AdaCache may leave out one


def alone() -> dict[str, list[str]]:
    """The first families on which each patch works by itself, as it is."""
    table = json.loads(contract.COMPATIBILITY.read_text())
    return {slug: [family for family in FIRST if row[family] == {"works": True}] for slug, row in table.items()}


def pairs() -> list[tuple[str, str, list[str]]]:
    """Every two patches with the families on which both work, where there is one."""
    works = alone()
    found = [(a, b, [family for family in works[a] if family in works[b]]) for a, b in itertools.combinations(works, 2)]
    return [(a, b, families) for a, b, families in found if families]


def put(slug: str, pipe):
    method = importlib.import_module(f"methods.{slug}")
    return method.apply(pipe, contract.engaging(method))


def verdict(a: str, b: str, family: str) -> bool | str:
    """True where the two stack in either order, else the reason they give."""
    reasons, pipe = [], contract.untouched(family)
    for first, second in ((a, b), (b, a)):
        with put(first, pipe):
            try:
                put(second, pipe).remove()
            except ValueError as refusal:
                reasons.append(str(refusal))
    assert len(reasons) in (0, 2), f"{a} and {b} stack in one order only: {reasons}"
    return reasons[0] if reasons else True


def test_table(request):
    only, committed = request.config.getoption("--method"), json.loads(PAIRS.read_text())
    table: dict = {}
    for a, b, families in pairs():
        tried = only in (None, a, b) or b not in committed.get(a, {})             # or another new one
        table.setdefault(a, {})[b] = {family: verdict(a, b, family) for family in families} if tried else committed[a][b]
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    if request.config.getoption("--update"):
        PAIRS.write_text(text)
    assert PAIRS.read_text() == text, "stale: run pytest tests/test_pairs.py --update"


def stacking() -> list[tuple[str, str, str]]:
    """One in three pairs that stack, on an archetype where there is one; `pytest --everything`: all pairs on all families."""
    found, table, everything = [], json.loads(PAIRS.read_text()) if PAIRS.exists() else {}, "EVERYTHING" in os.environ
    for a, rows in table.items():
        for b, row in rows.items():
            families = [family for family, stacks in row.items() if stacks is True]
            some = [family for family in families if family in contract.ARCHETYPES][:1] or families[:1]
            chosen = some if zlib.crc32(f"{a} {b}".encode()) % 3 == 0 else []        # the same ones wherever tests run
            found += [(a, b, family) for family in (families if everything else chosen)]
    return found


@pytest.mark.parametrize("a, b, family", stacking())
def test_a_pair_that_stacks_does_what_one_method_does(a, b, family):
    setting = {"steps": STEPS} | contract.several(*(importlib.import_module(f"methods.{slug}") for slug in (a, b)))
    plain, family, results = contract.plain(family, **setting), FAMILIES[family], []
    for first, second in ((a, b), (b, a)):
        pipe = family.pipe()
        with put(first, pipe) as p, put(second, pipe) as q:
            results.append(family.run(pipe, **setting))
            assert p.report()["state"] == q.report()["state"] == "engaged"
            family.run(pipe, **setting | {"seed": 1, "batch": 2})
            assert torch.equal(family.run(pipe, **setting), results[-1])
            p.remove()                                               # the first one on comes off first
        assert torch.equal(family.run(pipe, **setting), plain)
        assert results[-1].isfinite().all() and not torch.equal(results[-1], plain)
    assert torch.equal(*results)
