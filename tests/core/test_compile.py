"""With a patch on, the repeated blocks still compile whole, and few times, on a model of 16 blocks."""
import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family
from torch._dynamo.utils import counters

from methods import (
    agent_attention,
    asymrnr,
    at_edm,
    cat_pruning,
    dato,
    deepcache,
    fora,
    highlight_diffusion,
    itome,
    ocd,
    pfdiff,
    sito,
    toca,
    todo,
    tofu,
    toma,
    tome,
    turbo,
)
from methods._core.denoiser import describe

BLOCKS, STEPS = 16, 8
VARIANTS = 2                # of an unpatched DiT: the first block is given a transposed view
METHODS = [(tome, tome.Config(), 1), (todo, todo.Config(), 1), (fora, fora.Config(interval=3), 2), (pfdiff, pfdiff.Config(), 1),
           (toca, toca.Config(fresh=0.2), 3)]      # kinds of step: computing, reusing, renewing some rows


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        yield
    torch._dynamo.reset()


def compile_blocks(model):
    classes = describe(model).block_classes
    blocks = [module for module in model.modules() if isinstance(module, classes)]
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    return blocks


@pytest.mark.parametrize("order", ["compile_then_patch", "patch_then_compile"])
@pytest.mark.parametrize("method, config, kinds", METHODS, ids=lambda v: getattr(v, "__name__", "").removeprefix("methods."))
def test_blocks_compile_whole(method, config, kinds, order):
    family = FAMILIES["dit"]
    eager = family.pipe(layers=BLOCKS)
    with method.apply(eager, config):
        expected = family.run(eager, steps=STEPS)
    pipe = family.pipe(layers=BLOCKS)
    if order == "compile_then_patch":
        assert len(compile_blocks(pipe.transformer)) == BLOCKS
        plain = family.run(pipe, steps=2)
    with method.apply(pipe, config) as patch:
        if order == "patch_then_compile":
            compile_blocks(pipe.transformer)
        out = family.run(pipe, steps=STEPS)
        assert patch.report()["state"] == "engaged"
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-3)
        compiled = counters["stats"]["unique_graphs"]
        family.run(pipe, steps=STEPS, seed=1)
        assert counters["stats"]["unique_graphs"] == compiled                       # a second run compiles nothing
    assert 0 < compiled <= VARIANTS * (kinds + (order == "compile_then_patch"))
    assert not counters["graph_break"]
    if order == "compile_then_patch":
        assert torch.equal(family.run(pipe, steps=2), plain)


@pytest.mark.parametrize("method, config", [(tome, tome.Config(max_downsample=2)), (todo, todo.Config(factor_level_2=2)),
                                            (deepcache, deepcache.Config(interval=2))])
def test_unet_blocks_compile_whole(method, config):
    family = FAMILIES["unet"]
    eager = family.pipe(layers=7)
    with method.apply(eager, config):
        expected = family.run(eager, steps=4)
    pipe = family.pipe(layers=7)
    with torch._dynamo.config.patch(recompile_limit=16):                  # two widths, two resolutions
        assert len(compile_blocks(pipe.unet)) >= BLOCKS
        with method.apply(pipe, config):
            torch.testing.assert_close(family.run(pipe, steps=4), expected, atol=1e-3, rtol=1e-2)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("name, method", [
    ("pixart", tome), ("sd3", tome), ("flux", tome), ("pixart", fora), ("sd3", fora), ("flux", fora),
    ("cogvideox", asymrnr), ("dit", at_edm), ("sd3", cat_pruning), ("unet", dato), ("sd3", itome), ("cogvideox", ocd),
    ("unet", sito), ("flux", tofu), ("flux", toma), ("pixart", turbo), ("pixart", agent_attention)],
    ids=lambda v: getattr(v, "__name__", v))
def test_other_families_compile_whole(name, method):
    family = FAMILIES[name]
    eager, pipe = family.pipe(), family.pipe()
    with method.apply(eager):
        expected = family.run(eager)
    compile_blocks(Family.model(pipe))
    with method.apply(pipe):
        torch.testing.assert_close(family.run(pipe), expected, atol=1e-3, rtol=1e-2)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_blocks_that_run_at_several_sizes_compile_whole(name):
    family, config = FAMILIES[name], contract.engaging(highlight_diffusion)
    eager, pipe = family.pipe(), family.pipe()
    with highlight_diffusion.apply(eager, config):
        expected = family.run(eager, steps=STEPS)
    compile_blocks(Family.model(pipe))
    with highlight_diffusion.apply(pipe, config) as patch:
        torch.testing.assert_close(family.run(pipe, steps=STEPS), expected, atol=1e-3, rtol=1e-2)
        assert patch.report()["partial"] > 0
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
