"""Blocks compile whole under every method, one graph for each kind of step, before or after it is put on."""
import os

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family
from torch._dynamo.utils import counters

from methods._core.denoiser import describe

STEPS = 10                 # the longest warm-up of a default is eight
LIMIT = 16                 # of graphs for the code of a block: kinds of step, times two layouts of its input
MANY = 17                  # blocks: one graph for each would be too many
METHODS = [method for method in contract.patches() if not getattr(method, "BREAKS_GRAPH", False)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=LIMIT):
        yield
    torch._dynamo.reset()


def compile_blocks(pipe):
    model = Family.model(pipe)
    for block in model.modules():
        if isinstance(block, describe(model).block_classes):
            block.compile(fullgraph=True, backend="aot_eager")


def home(method):
    """The family with the cheapest blocks on which the method works."""
    families = contract.working(method)
    return next((family for family in families if family.name == "dit"), families[0])


def elsewhere():
    for method in METHODS:
        for family in contract.working(method):
            if family is not home(method) and (family.name in contract.ARCHETYPES or "EVERYTHING" in os.environ):
                yield pytest.param(method, family, id=f"{contract.slug(method)}-{family.name}")


@pytest.mark.parametrize("order", ["compile_then_patch", "patch_then_compile"])
@pytest.mark.parametrize("method", METHODS, ids=contract.slug)
def test_blocks_compile_whole(method, order):
    family, config, setting = home(method), contract.engaging(method), contract.several(method)
    layers = {"layers": MANY} if family.name == "dit" else {}
    eager, pipe = family.pipe(**layers), family.pipe(**layers)
    with method.apply(eager, config):
        expected = family.run(eager, steps=STEPS, **setting)
    if order == "compile_then_patch":
        compile_blocks(pipe)
        plain = family.run(pipe, steps=2, **setting)
    with torch._dynamo.config.patch(recompile_limit=LIMIT if layers else 2 * LIMIT):      # a UNet has two widths, two sizes
        with method.apply(pipe, config) as patch:
            if order == "patch_then_compile":
                compile_blocks(pipe)
            out = family.run(pipe, steps=STEPS, **setting)
            assert patch.report()["state"] == "engaged"
            torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-2)
            compiled = counters["stats"]["unique_graphs"]
            family.run(pipe, steps=STEPS, seed=1, **setting)
            assert counters["stats"]["unique_graphs"] == compiled                     # a second run compiles nothing
        assert compiled > 0 and not counters["graph_break"]
        if order == "compile_then_patch":
            assert torch.equal(family.run(pipe, steps=2, **setting), plain)


@pytest.mark.parametrize("method, family", elsewhere())
def test_other_families_compile_whole(method, family):
    config, setting = contract.engaging(method), contract.several(method)
    eager, pipe = family.pipe(), family.pipe()
    with method.apply(eager, config):
        expected = family.run(eager, steps=STEPS, **setting)
    compile_blocks(pipe)
    with torch._dynamo.config.patch(recompile_limit=2 * LIMIT), method.apply(pipe, config):
        torch.testing.assert_close(family.run(pipe, steps=STEPS, **setting), expected, atol=1e-3, rtol=1e-2)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_a_method_whose_blocks_do_not_compile_whole_says_so():
    for method in contract.patches():
        if method not in METHODS:
            pipe = FAMILIES["dit"].pipe()
            compile_blocks(pipe)
            with method.apply(pipe, contract.engaging(method)), pytest.raises(torch._dynamo.exc.TorchDynamoException):
                FAMILIES["dit"].run(pipe, steps=2)
