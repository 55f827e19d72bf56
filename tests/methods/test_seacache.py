import math

import pytest
import torch
from contracts import patch as contract
from diffusers.hooks.sea_cache import _apply_sea_filter
from families import FAMILIES

from methods import seacache, teacache
from methods._core.look import relative_change
from methods._core.patch import Patch
from methods.seacache import Config, filtered, gain

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]


@pytest.mark.parametrize("check, case", contract.cases(seacache, seacache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("sigma, raw", [(0.5, [2, 1.96923, 1.88235, 1.75342, 1.6]), (0.8, [5, 4, 2.5, 1.53846, 1])])
def test_worked_gains(sigma, raw):
    half = torch.tensor(raw, dtype=torch.float64)
    whole = torch.cat([half, half[1:4].flip(0)])
    torch.testing.assert_close(gain((8,), 1 - sigma, sigma, 2.0), whole / whole.mean(), atol=1e-5, rtol=0)


def test_without_noise_nothing_is_filtered_and_in_noise_only_the_mean_is_left():
    torch.testing.assert_close(gain((4, 6), 1.0, 0.0, 2.0), torch.ones(4, 6, dtype=torch.float64))
    alone = gain((8,), 1e-6, 1 - 1e-6, 2.0)
    assert alone[0] == pytest.approx(8, abs=1e-3) and alone[1:].abs().max() < 1e-3
    assert gain((8,), 0.0, 1.0, 2.0).isfinite().all()                   # the first step of flow matching
    assert gain((3, 5, 7), 0.4, 0.6, 3.0).mean() == pytest.approx(1)


@pytest.mark.parametrize("grid", [(1, 6, 8), (3, 5, 7), (2, 4, 4)])
@pytest.mark.parametrize("sigma, beta", [(0.1, 2.0), (0.5, 3.0), (0.97, 3.0)])
def test_the_filter_is_that_of_diffusers(grid, sigma, beta):
    x = torch.randn(1, math.prod(grid), 5, generator=torch.Generator().manual_seed(0))
    theirs = _apply_sea_filter(x[0].unflatten(0, grid), sigma, beta)
    ours = filtered(x, grid, gain(grid, 1 - sigma, sigma, beta))
    torch.testing.assert_close(ours[0].unflatten(0, grid), theirs, atol=1e-6, rtol=1e-5)


def test_the_distance_knows_neither_scale_nor_order_of_channels_and_batch():
    x, y = torch.randn(2, 2, 12, 6, generator=torch.Generator().manual_seed(1))
    response = gain((3, 4), 0.3, 0.7, 2.0)

    def distance(x, y):
        return relative_change(filtered(x, (3, 4), response), filtered(y, (3, 4), response))
    channels = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    assert distance(x, y) == pytest.approx(distance(3 * x[..., channels].flip(0), 3 * y[..., channels].flip(0)), rel=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_the_blocks_run_when_the_filtered_input_changed(name):
    """Compared with what a look from outside sees, filtered at the noise that the scheduler's own tables give."""
    family, signals, ran = FAMILIES[name], {}, {}
    pipe = family.pipe()
    threshold = 0.35 if name == "cogvideox" else 0.9
    with seacache.apply(pipe, Config(threshold=threshold)) as patch:
        watch = Patch(pipe, "watch")
        block = watch.denoiser.blocks[0]

        def note(context):
            grid = context.grid(block)
            scheduler = pipe.scheduler
            if hasattr(scheduler, "alphas_cumprod"):
                kept = float(scheduler.alphas_cumprod[int(context.t)])
                a, b = kept ** 0.5, (1 - kept) ** 0.5
            else:
                b = float(scheduler.sigmas[context.i])
                a = 1 - b
            tokens = block.parted(watch.look(context), math.prod(grid), 1)[0]
            response = gain(grid, a, b, 3.0 if context.size[0] > 1 else 2.0)
            signals.setdefault(context.branch, []).append(filtered(tokens, grid, response))
            ran.setdefault(context.branch, []).append(watch.reaches(watch.denoiser.blocks[-1].attn))

        watch.each_call(note)
        with watch.on():
            family.run(pipe, steps=9)
        assert patch.report()["state"] == "engaged"
    for branch, seen in signals.items():
        computed, total = [0], 0.0
        for step in range(1, 9):
            total += relative_change(seen[step], seen[step - 1])
            if step == 8 or total >= threshold:
                computed, total = [*computed, step], 0.0
        assert [i for i, runs in enumerate(ran[branch]) if runs] == computed


def test_without_a_power_law_it_is_teacache():
    """beta = 0: one gain for all frequencies, so that nothing is filtered."""
    results = {}
    for method, config in ((seacache, Config(threshold=1.0, beta=0.0)),
                           (teacache, teacache.Config(threshold=1.0, coefficients=(1.0, 0.0)))):
        pipe = FAMILIES["dit"].pipe()
        with method.apply(pipe, config) as patch:
            results[method] = FAMILIES["dit"].run(pipe, steps=9)
            assert patch.report()["reused"] > 0
    assert torch.equal(*results.values())


def test_a_threshold_never_met_says_the_smallest_change():
    pipe = FAMILIES["dit"].pipe()
    with seacache.apply(pipe, Config(threshold=1e-6)) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe, steps=4), contract.plain("dit", steps=4))
        assert "the smallest change seen was 0." in patch.report()["reason"]


def test_cost_falls_and_distance_grows_along_the_threshold():
    configs = (Config(threshold=threshold) for threshold in (1e-6, 0.5, 1.2, 1e9))
    assert contract.costs_fall_and_distances_grow(seacache, configs)[-1] == 2


@pytest.mark.parametrize("name", ["dit", "flux", "latte", "cogvideox"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(seacache, seacache.TINY, FAMILIES[name]), steps=6)
    assert all(report["reused"] > 0 for report in reports)


@pytest.mark.parametrize("bad", [{"threshold": -0.1}, {"beta": -1.0}])
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match="must not be negative"):
        Config(**bad)
