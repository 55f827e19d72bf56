"""catalog/surroundings.json says in whose company each patch works. It is derived here, by trying every method in every
situation of tests/surroundings whose model it works on.

`pytest tests/test_surroundings.py --update` writes it anew, with `--method SLUG` the row of one method.
"""
import json
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES
from surroundings import Situation, situations

pytestmark = pytest.mark.slow

TABLE = contract.ROOT / "catalog/surroundings.json"
SHARE = 0.05           # of what moving the companion's input does to the plain run, and must still do under the patch


@cache
def plain(name: str, **setting) -> tuple[Any, list[torch.Tensor]]:
    """A pipeline in that situation, on which patches are put and taken off again, and its two runs without any."""
    situation = situations()[name]
    pipe = situation.make()
    return pipe, [situation.seeded(pipe, moved, **setting) for moved in (0, 1)]


def tried(method: ModuleType, situation: Situation, change: dict[str, Any]) -> dict[str, Any]:
    """Right is: it engages, the result is finite, a second run equals the first, the companion still has its effect, and the
    method comes off without a trace. Else it is refused, or says why it leaves nothing out."""
    setting = contract.several(method)
    pipe, (first, moved) = plain(situation.name, **setting)
    effect = float((moved - first).norm())
    assert effect > 0
    try:
        with method.apply(pipe, replace(contract.engaging(method), **change)) as patch:
            found = [situation.seeded(pipe, each, **setting) for each in (0, 1, 0)]
            report = patch.report()
    except ValueError as refusal:
        assert contract.slug(method) in str(refusal), "an error, not a refusal"
        return {"works": False, "reason": str(refusal)}
    finally:
        assert torch.equal(situation.seeded(pipe, 0, **setting), first)
    assert all(x.isfinite().all() for x in found) and torch.equal(found[0], found[2])
    assert float((found[1] - found[0]).norm()) > SHARE * effect, "the companion has lost its effect"
    if report["state"] == "no gain":
        return {"works": False, "reason": report["reason"]}
    assert report["state"] == "engaged" and not torch.equal(found[0], first)
    return {"works": True}


@pytest.mark.parametrize("method", contract.patches(), ids=contract.slug)
def test_table(method, request):
    if request.config.getoption("--method") not in (None, contract.slug(method)):
        pytest.skip("another method was asked for")
    row = {name: tried(method, situation, change) for name, situation in situations().items()
           if (change := contract.setting(method, FAMILIES[situation.family])) is not None}
    if request.config.getoption("--update"):
        contract.record(TABLE, method, row)
    found = json.loads(TABLE.read_text()).get(contract.slug(method))
    assert found == row, "stale: run pytest tests/test_surroundings.py --update"
