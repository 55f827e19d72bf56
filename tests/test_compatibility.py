"""catalog/compatibility.json says on which model family each patch works, and why not. It is derived here, by trying.

`pytest tests/test_compatibility.py --update` writes it anew, with `--method SLUG` the row of one method.
"""
import json

import pytest
from contracts import patch as contract
from families import FAMILIES, Family


def test_table(request):
    only, committed = request.config.getoption("--method"), json.loads(contract.COMPATIBILITY.read_text())
    table = {contract.slug(method): {name: contract.attempt(method, family) for name, family in FAMILIES.items()}
             for method in contract.patches() if only in (None, contract.slug(method))}
    if only is not None:
        table = dict(sorted((committed | table).items()))
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    if request.config.getoption("--update"):
        contract.COMPATIBILITY.write_text(text)
    assert contract.COMPATIBILITY.read_text() == text, "stale: run pytest tests/test_compatibility.py --update"


@pytest.mark.parametrize("method", contract.patches(), ids=contract.slug)
def test_a_refusal_leaves_the_model_as_it_was(method):
    for name, found in json.loads(contract.COMPATIBILITY.read_text())[contract.slug(method)].items():
        if not found["works"]:
            pipe = FAMILIES[name].pipe()
            with pytest.raises(ValueError, match="has no|not a first-order"):
                method.apply(pipe)
            assert "_patch_site" not in vars(Family.model(pipe))
