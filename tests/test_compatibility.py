"""catalog/compatibility.json says on which model family each patch works, and why not. It is derived here, by trying.

`pytest tests/test_compatibility.py --update` writes it anew.
"""
import importlib
import json
from pathlib import Path

import contract
import pytest
from families import FAMILIES

METHODS = Path(__file__).parents[1] / "methods"


def patches():
    modules = [importlib.import_module(f"methods.{path.stem}") for path in sorted(METHODS.glob("[a-z]*.py"))]
    return [module for module in modules if hasattr(module, "apply")]


def entry(method, family) -> dict:
    pipe = family.pipe()
    try:
        with method.apply(pipe, contract.engaging(method)) as patch:
            family.run(pipe, steps=6)
            assert patch.report()["state"] == "engaged", (method, family.name, patch.report())
    except ValueError as refusal:
        return {"works": False, "reason": str(refusal)}
    return {"works": True}


def test_table(request):
    table = {contract.slug(method): {name: entry(method, family) for name, family in FAMILIES.items()} for method in patches()}
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    if request.config.getoption("--update"):
        contract.COMPATIBILITY.write_text(text)
    assert contract.COMPATIBILITY.read_text() == text, "stale: run pytest tests/test_compatibility.py --update"


@pytest.mark.parametrize("method", patches(), ids=contract.slug)
def test_a_refusal_leaves_the_model_as_it_was(method):
    for name, found in json.loads(contract.COMPATIBILITY.read_text())[contract.slug(method)].items():
        if not found["works"]:
            pipe = FAMILIES[name].pipe()
            with pytest.raises(ValueError, match="has no|not a first-order"):
                method.apply(pipe)
            assert "_patch_run" not in vars(getattr(pipe, "unet", None) or pipe.transformer)
