"""catalog/compatibility.json says on which model family each patch works, with which setting, and why not. It is derived here,
by trying.

`pytest tests/test_compatibility.py --update` writes it anew, with `--method SLUG` the row of one method.
"""
import contextlib
import json

import pytest
from contracts import patch as contract
from families import FAMILIES, Family

pytestmark = pytest.mark.slow


def committed() -> dict:
    return json.loads(contract.COMPATIBILITY.read_text())


@pytest.mark.parametrize("method", contract.patches(), ids=contract.slug)
def test_table(method, request):
    if request.config.getoption("--method") not in (None, contract.slug(method)):
        pytest.skip("another method was asked for")
    row = {name: contract.attempt(method, family) for name, family in FAMILIES.items()}
    if request.config.getoption("--update"):
        contract.record(contract.COMPATIBILITY, method, row)
    assert committed().get(contract.slug(method)) == row, "stale: run pytest tests/test_compatibility.py --update"


def test_the_table_has_no_other_rows():
    assert set(committed()) == {contract.slug(method) for method in contract.patches()}


@pytest.mark.parametrize("method", contract.patches(), ids=contract.slug)
def test_a_refusal_leaves_the_model_as_it_was(method):
    for name, found in committed()[contract.slug(method)].items():
        if not found["works"]:
            pipe = contract.untouched(name)
            with contextlib.suppress(ValueError):
                method.apply(pipe, contract.engaging(method)).remove()             # it was tried, and left nothing out
            assert not any("_patch_site" in vars(model) for model in Family.models(pipe))
