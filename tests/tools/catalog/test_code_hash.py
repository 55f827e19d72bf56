"""The hash of a method's code follows every definition that the method reaches, and nothing else."""
import pytest

from accel_tools.catalog import ROOT
from accel_tools.catalog.code_hash import Code, Reached, code_hash
from accel_tools.catalog.source import Source

MODULE = "methods/method_2.py"
METHOD = """from methods._core import parts
from methods._core.parts import Store as Kept, LIMIT

__all__ = ["apply"]


def apply(model):
    store = Kept(model)
    with store:
        return store.take(), parts.scale(LIMIT), getattr(store, "named")()
"""
PARTS = '''from dataclasses import dataclass
from torch import nn
from accel_kernels import op

LIMIT = 3
OTHER = 4
TABLE = {}
TABLE["a"] = 1
op.extend(LIMIT)


class Base:
    width = 1

    def grow(self):
        return self.width


class Store(Base):
    size: int = 2

    def __enter__(self):
        return self

    def take(self):
        return self.grow() + op.run(TABLE)

    def named(self):
        return 1

    def idle(self):
        return _idle()


class Layer(nn.Module):
    def hook(self):
        return 1


def _idle():
    return 0


def scale(n):
    """Doubles."""
    return _twice(n) if n else Layer()


def _twice(n):
    return 2 * n
'''
OP = """import torch
LEAST = 1


def run(x):
    return _run(x, LEAST)


def _run(x, least):
    return least


@_run.register_fake
def _(x, least):
    return 0


def other(x):
    return x


@other.register_fake
def _(x):
    return 0
"""


@pytest.mark.parametrize(("old", "new", "same"), [
    ("# r, Sec. 3", "# another word", True),
    ('"""Eq. 0: keeps what is alike.', '"""Eq. 0: something else.', True),
    ("OFF = Config(ratio=0.0)", "OFF = Config( ratio = 0.0 )", True),
    ("float = 0.5", "float = 0.6", False),
    ("token.weight > r", "token.weight >= r", False),
])
def test_hash_follows_behaviour(toy, edit, old, new, same):
    before = code_hash("method_2", toy)
    edit(MODULE, old, new)
    assert (code_hash("method_2", toy) == before) is same


@pytest.fixture
def layered(toy):
    """Method 2 over a core module and a kernel."""
    for folder in ("methods/_core", "kernels"):
        (toy / folder).mkdir()
    (toy / MODULE).write_text(METHOD)
    (toy / "methods/_core/parts.py").write_text(PARTS)
    (toy / "kernels/op.py").write_text(OP)
    return toy


CORE, KERNEL = "methods/_core/parts.py", "kernels/op.py"


@pytest.mark.parametrize(("file", "old", "new"), [
    pytest.param(CORE, "LIMIT = 3", "LIMIT = 5", id="constant"),
    pytest.param(CORE, 'TABLE["a"] = 1', 'TABLE["a"] = 2', id="item of a table"),
    pytest.param(CORE, "op.extend(LIMIT)", "op.extend(OTHER)", id="what is done at import"),
    pytest.param(CORE, "width = 1", "width = 2", id="attribute of a base"),
    pytest.param(CORE, "size: int = 2", "size: int = 2\n    more: int = 1", id="new attribute"),
    pytest.param(CORE, "return self.width", "return 0", id="method of a base"),
    pytest.param(CORE, "return self\n", "return None\n", id="method that a statement calls"),
    pytest.param(CORE, "self.grow() + op", "op", id="method"),
    pytest.param(CORE, "def named(self):\n        return 1", "def named(self):\n        return 2", id="named in a string"),
    pytest.param(CORE, "def hook(self):\n        return 1", "def hook(self):\n        return 2", id="called from outside"),
    pytest.param(CORE, "2 * n", "3 * n", id="function of a function"),
    pytest.param(CORE, "from accel_kernels import op", "from others import op", id="where a name comes from"),
    pytest.param(KERNEL, "LEAST = 1", "LEAST = 2", id="constant of a kernel"),
    pytest.param(KERNEL, "def _(x, least):\n    return 0", "def _(x, least):\n    return 1", id="registration"),
    pytest.param(MODULE, "Store as Kept", "Layer as Kept", id="another thing by the same name"),
])
def test_a_reached_definition_changes_the_hash(layered, edit, file, old, new):
    before, other = code_hash("method_2", layered), code_hash("method_1", layered)
    edit(file, old, new)
    assert code_hash("method_2", layered) != before
    assert code_hash("method_1", layered) == other


@pytest.mark.parametrize(("file", "old", "new"), [
    pytest.param(CORE, "LIMIT = 3", "LIMIT = 3\nNEW = 1", id="new constant"),
    pytest.param(CORE, "OTHER = 4", "OTHER = 5", id="constant that nothing names"),
    pytest.param(CORE, "def _idle", "def new():\n    return LIMIT\n\n\ndef _idle", id="new function"),
    pytest.param(CORE, "    def idle", "    def new(self):\n        return 1\n\n    def idle", id="new method"),
    pytest.param(CORE, "return _idle()", "return 1", id="method that nothing calls"),
    pytest.param(CORE, "return 0", "return 1", id="function of a method that nothing calls"),
    pytest.param(CORE, "Doubles", "Makes twice as much", id="docstring"),
    pytest.param(CORE, "from torch", "import math\nfrom torch", id="import"),
    pytest.param(KERNEL, "return x\n", "return -x\n", id="function of a kernel"),
    pytest.param(KERNEL, "def _(x):\n    return 0", "def _(x):\n    return 1", id="registration of another"),
])
def test_what_nothing_reaches_does_not(layered, edit, file, old, new):
    before = code_hash("method_2", layered)
    edit(file, old, new)
    assert code_hash("method_2", layered) == before


def test_a_definition_may_move(layered, edit):
    before = code_hash("method_2", layered)
    edit(CORE, "def _twice(n):\n    return 2 * n\n", "")
    edit(CORE, "from torch", "from methods._core.numbers import _twice\nfrom torch")
    (layered / "methods/_core/numbers.py").write_text("def _twice(n):\n    return 2 * n\n")
    assert code_hash("method_2", layered) == before


def test_a_name_made_at_run_time_may_be_any(layered, edit):
    edit(MODULE, '"named"', 'f"na{model}"')
    before = code_hash("method_2", layered)
    edit(CORE, "return _idle()", "return 1")
    assert code_hash("method_2", layered) != before


def test_fora_reaches_its_machinery_and_no_kernel():
    code = Code(Source())
    names = {piece.name for piece in Reached(code, ROOT / "methods/fora.py").pieces}
    assert {"Config.__post_init__", "OFF", "apply", "computes", "Reuse.around", "Patch.around", "Patch.report", "Run",
            "StepContext", "describe"} <= names
    assert not names & {"merge", "segments", "Reduction", "cosine_match"}


def test_missing_and_broken_code_is_told(toy):
    with pytest.raises(FileNotFoundError, match="methods/nowhere.py"):
        code_hash("nowhere", toy)
    (toy / MODULE).write_text("def (")
    with pytest.raises(SyntaxError):
        code_hash("method_2", toy)
