import numpy as np
import pytest
import torch
from contracts import patch as contract
from diffusers import MagCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from families import FAMILIES, Family

from methods import magcache
from methods._core.denoiser import describe
from methods._core.patch import Patch
from methods.magcache import RATIOS, Config, Since, accumulate, nearest

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]


@pytest.mark.parametrize("check, case", contract.cases(magcache, magcache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def schedule(config, ratios, steps):
    """Which steps compute, by hand; nothing of a model enters."""
    computed, since = [0], Since()
    for i in range(1, steps):
        at, due, then = nearest(i, steps, len(ratios)), True, Since()
        if i >= int(config.warmup * steps + 0.5):
            due, then = accumulate(since, ratios[at], config.threshold, config.max_reused)
        if due or at in config.always:
            computed, then = [*computed, i], Since()
        since = then
    return computed


def test_worked_example():
    since, found = Since(), []
    for ratio in (0.98, 0.97, 0.99, 0.90):
        due, since = accumulate(since, ratio, 1.0, 9)
        assert not due
        found.append(since)
    assert [each.magnitude for each in found] == pytest.approx([0.98, 0.9506, 0.941094, 0.8469846])
    assert [each.error for each in found] == pytest.approx([0.02, 0.0694, 0.128306, 0.2813214])
    assert accumulate(found[1], 0.99, 0.12, 9) == (True, Since())
    assert accumulate(Since(), 1.5, 0.5, 9)[0] is False                     # equal to the threshold is within it
    assert accumulate(Since(steps=2), 1.0, 0.5, 2)[0] is True


@pytest.mark.parametrize("setting, expected", [
    (dict(threshold=0.24, max_reused=5, warmup=0.1, always=(11,)), [0, 1, 2, 5, 9, 11, 17, 23, 26]),
    (dict(threshold=0.24, max_reused=5, warmup=0.1), [0, 1, 2, 5, 9, 15, 21, 26]),
    (dict(threshold=0.06, max_reused=3, warmup=0.2), [0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 21, 24, 26, 27])])
def test_the_schedule_of_flux(setting, expected):
    """What FLUX.1-dev computes of 28 steps by the official settings, and by those of diffusers."""
    assert schedule(Config(**setting), RATIOS["flux"], 28) == expected


def test_steady_magnitudes_leave_out_so_many_in_a_row():
    assert schedule(Config(max_reused=3, warmup=0.0), (1.0,), 10) == [0, 4, 8]


def test_ratios_are_taken_from_the_nearest_step_of_the_run_they_are_of():
    assert [nearest(i, 28, 28) for i in range(28)] == list(range(28))
    assert nearest(0, 1, 28) == 27
    for steps in (2, 5, 7, 11, 20, 31, 50, 100):
        expected = np.round(np.arange(steps) * (27 / (steps - 1))).astype(int).tolist()
        assert [nearest(i, steps, 28) for i in range(steps)] == expected and expected[-1] == 27


@pytest.mark.parametrize("name", CHAINS)
def test_the_same_steps_compute_whatever_is_drawn(name):
    """Seen from outside, for two noises, other words, and a batch of two: those known beforehand."""
    family, config = FAMILIES[name], Config(ratios=(1.0, 0.9, 0.95, 1.1, 0.8), threshold=0.3, max_reused=3, warmup=0.1)
    pipe, expected = family.pipe(), schedule(config, config.ratios, 11)
    assert 2 < len(expected) < 10
    with magcache.apply(pipe, config) as patch:
        watch, ran = Patch(pipe, "watch"), {}
        watch.each_call(lambda context: ran.setdefault(context.branch, []).append(
            watch.reaches(watch.denoiser.blocks[-1].attn)))
        with watch.on():
            for setting in ({}, {"seed": 5}, {"batch": 2}):
                ran.clear()
                family.run(pipe, steps=11, **setting)
                assert patch.report()["state"] == "engaged"
                assert all([i for i, runs in enumerate(each) if runs] == expected for each in ran.values()), setting


def test_a_second_call_of_guidance_has_ratios_of_its_own():
    pipe, ran = FAMILIES["wan"].pipe(), {}
    config = Config(ratios=(1.0,), second=(0.5,), max_reused=9, warmup=0.0)
    with magcache.apply(pipe, config):
        watch = Patch(pipe, "watch")
        watch.each_call(lambda context: ran.setdefault(context.call, []).append(
            watch.reaches(watch.denoiser.blocks[-1].attn)))
        with watch.on():
            FAMILIES["wan"].run(pipe, steps=4)
    assert ran == {0: [True, False, False, False], 1: [True] * 4}


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_reused_is_what_the_blocks_added(name):
    """In a step that is left out, what enters the tail differs from what entered the blocks by the residual kept, once."""
    config = Config(ratios=(1.0,), max_reused=9, warmup=0.0)
    for before, after in contract.around_the_blocks(contract.Case(magcache, config, FAMILIES[name]), steps=3)[0]:
        for step in (1, 2):
            assert not torch.equal(before[step], before[0])
            torch.testing.assert_close(after[step] - before[step], after[0] - before[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_observed_is_what_hooks_see(name):
    """The mean over tokens of the ratios of norms, not the ratio of their means; the run itself stays as it is."""
    family, entered, left, ratios = FAMILIES[name], [], [], {}
    pipe = family.pipe()
    denoiser = describe(Family.model(pipe))
    with magcache.observe(pipe, ratios) as patch:
        assert torch.equal(family.run(pipe, steps=5), contract.plain(name))
        assert patch.report()["observed"] == 5
        family.run(pipe, steps=4)                               # of the last run alone
    first = denoiser.blocks[0]
    first.module.register_forward_pre_hook(
        lambda m, args, kwargs: entered.append(first.streams(args, kwargs)[0].clone()), with_kwargs=True)
    denoiser.tail.register_forward_pre_hook(lambda m, args: left.append(args[0].clone()))
    family.run(pipe, steps=4)
    norms = [(after - before).norm(dim=-1) for before, after in zip(entered, left, strict=True)]
    expected = [1.0, *(float((new / old).mean()) for old, new in zip(norms, norms[1:], strict=False))]
    assert ratios == {0: pytest.approx(expected, rel=1e-5)}


def test_a_residual_that_grows_evenly_has_its_factor_as_ratio():
    pipe, ratios, step = FAMILIES["dit"].pipe(), {}, []
    *others, last = describe(pipe.transformer).blocks

    def add(x, *args, **kwargs):
        step.append(1)
        return x + 0.75 ** len(step) * torch.linspace(1, 2, x.shape[-1])

    last.module.forward = add
    for block in others:
        block.module.forward = lambda x, *args, **kwargs: x
    with magcache.observe(pipe, ratios):
        FAMILIES["dit"].run(pipe, steps=4)
    assert ratios[0] == pytest.approx([1.0, 0.75, 0.75, 0.75], rel=1e-4)


SETTINGS = [dict(threshold=threshold, max_reused=k, warmup=warmup) for threshold in (0.06, 0.24, 0.8) for k in (1, 3, 6)
            for warmup in (0.0, 0.1, 0.2)]


@pytest.mark.parametrize("name, steps", [("flux", 7), ("flux", 13), ("flux", 28), ("cogvideox", 9)])
def test_whole_runs_are_those_of_the_hooks_of_diffusers(name, steps):
    """The same steps computed at the same settings, and the same result; ratios of FLUX.1-dev for all."""
    family = FAMILIES[name]
    assert RATIOS["flux"] == pytest.approx(FLUX_MAG_RATIOS.tolist())
    for setting in SETTINGS[steps % 5::5]:
        steps_run = []
        pipe = family.pipe()
        with magcache.apply(pipe, Config(ratios=RATIOS["flux"], **setting)):
            watch, ran = Patch(pipe, "watch"), []
            watch.each_call(lambda context, ran=ran, watch=watch: ran.append(watch.reaches(watch.denoiser.blocks[-1].attn)))
            with watch.on():
                ours = family.run(pipe, steps=steps)
        pipe = family.pipe()
        Family.model(pipe).enable_cache(MagCacheConfig(
            threshold=setting["threshold"], max_skip_steps=setting["max_reused"], retention_ratio=setting["warmup"],
            num_inference_steps=steps, mag_ratios=FLUX_MAG_RATIOS))
        Family.model(pipe).register_forward_pre_hook(lambda *args, seen=steps_run: seen.append(False))
        describe(Family.model(pipe)).blocks[-1].attn.register_forward_hook(
            lambda *args, seen=steps_run: seen.__setitem__(-1, True))
        theirs = family.run(pipe, steps=steps)
        assert ran == steps_run, setting
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_a_magnitude_that_changes_too_much_is_no_gain_and_says_so():
    pipe = FAMILIES["dit"].pipe()
    with magcache.apply(pipe, Config(ratios=(0.5,))) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe), contract.plain("dit", steps=4))
        assert patch.report()["reason"] == "the error of leaving out a step was 0.5 at least, the threshold is 0.12"
    with magcache.apply(pipe, Config(ratios=(1.0,), warmup=1.0)) as patch:
        FAMILIES["dit"].run(pipe)
        assert patch.report()["reason"] == "the first steps compute, and those with a ControlNet"


def test_cost_falls_and_distance_grows_along_the_threshold():
    configs = (Config(ratios=(0.95,), threshold=threshold, max_reused=99, warmup=0.0) for threshold in (1e-6, 0.1, 0.2, 1e9))
    assert contract.costs_fall_and_distances_grow(magcache, configs)[-1] == 1


@pytest.mark.parametrize("name", ["dit", "flux", "latte", "cogvideox"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(magcache, magcache.TINY, FAMILIES[name]), steps=6)
    assert all(report["reused"] > 0 for report in reports)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        magcache.apply(FAMILIES["dit"].pipe().transformer, magcache.TINY)
    with pytest.raises(ValueError, match="no ratios are known for this DiTTransformer2DModel; magcache.observe measures them"):
        magcache.apply(FAMILIES["dit"].pipe())
    with pytest.raises(ValueError, match="has no chain"):
        magcache.observe(FAMILIES["unet"].pipe(), {})
    with pytest.raises(ValueError, match="follows one denoiser"):
        magcache.observe(FAMILIES["wan22"].pipe(), {})
    with pytest.raises(ValueError, match="has no module behind its blocks"):
        magcache.observe(FAMILIES["z-image"].pipe(), {})
    pipe = FAMILIES["kandinsky5"].pipe()
    with magcache.observe(pipe, {}), pytest.raises(ValueError, match="enters the blocks and .* leaves them"):
        FAMILIES["kandinsky5"].run(pipe)


@pytest.mark.parametrize("bad", [{"threshold": -0.1}, {"max_reused": -1}, {"warmup": 1.5}, {"ratios": ()},
                                 {"second": (1.0, -1.0)}, {"ratios": (float("nan"),)}])
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) + "="):
        Config(**bad)
