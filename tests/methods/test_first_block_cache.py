from contextlib import nullcontext

import diffusers
import pytest
import torch
from contracts import patch as contract
from diffusers import FirstBlockCacheConfig
from families import FAMILIES, Family

from methods import first_block_cache, tome
from methods._core.denoiser import describe
from methods._core.look import relative_change
from methods._core.patch import Patch

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]


@pytest.mark.parametrize("check, case", contract.cases(first_block_cache, first_block_cache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def schedule(residuals, threshold, warmup=0):
    """Which steps compute the other blocks, by hand: the change is that since the last of them."""
    computed = []
    for step, residual in enumerate(residuals):
        if step < max(1, warmup) or relative_change(residual, residuals[computed[-1]]) > threshold:
            computed.append(step)
    return computed


def test_what_is_compared_with_is_that_of_the_last_computed_step():
    residuals = [torch.tensor([x]) for x in (1.0, 1.04, 1.08, 1.12, 1.2)]
    assert schedule(residuals, 0.1) == [0, 3]
    assert relative_change(torch.tensor([2.0]), torch.tensor([1.0])) == 1.0
    assert relative_change(torch.tensor([1.0]), torch.tensor([2.0])) == 0.5


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", CHAINS)
def test_the_other_blocks_run_when_the_first_changed(name, warmup):
    """Compared with what a look from outside sees the first block add, and with which blocks really ran."""
    family, residuals, ran = FAMILIES[name], {}, {}
    pipe = family.pipe()
    threshold = 0.2 if name == "cogvideox" else 0.95
    config = first_block_cache.Config(threshold=threshold, warmup=warmup)
    with first_block_cache.apply(pipe, config) as patch:
        watch = Patch(pipe, "watch")

        def note(context):
            residuals.setdefault(context.branch, []).append(watch.run_first(context)[0])
            ran.setdefault(context.branch, []).append(watch.reaches(watch.denoiser.blocks[-1].attn))

        watch.each_call(note)
        with watch.on():
            family.run(pipe, steps=9)
        assert patch.report()["state"] == "engaged"
    for branch, added in residuals.items():
        assert [i for i, runs in enumerate(ran[branch]) if runs] == schedule(added, threshold, warmup)


@pytest.mark.parametrize("name", CHAINS)
def test_the_residual_of_the_others_is_added_to_a_fresh_first_block(name):
    """In every step what enters the tail is x1 of that step, and the same residual behind it; the tail itself runs."""
    case = contract.Case(first_block_cache, first_block_cache.Config(threshold=1e9), FAMILIES[name])
    looks, report = contract.around_the_blocks(case, steps=4, first=1)
    calls, blocks = len(looks), len(describe(Family.model(case.family.pipe())).chain)
    assert (report["computed"], report["reused"]) == (calls, 3 * calls)
    assert report["saved"] == pytest.approx(0.75 * (blocks - 1) / blocks, abs=1e-3)
    for before, after in looks:
        if after[0].shape == before[0].shape:                     # Flux joins its text, Latte lays its tokens out anew
            for step in (1, 2, 3):
                assert not torch.equal(before[step], before[0])
                torch.testing.assert_close(after[step] - before[step], after[0] - before[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.7, 2.0])
@pytest.mark.parametrize("name, steps", [("flux", 6), ("flux", 11), ("cogvideox", 7)])
def test_whole_runs_are_those_of_the_hooks_of_diffusers(name, steps, threshold):
    family = FAMILIES[name]
    pipe = family.pipe()
    with first_block_cache.apply(pipe, first_block_cache.Config(threshold=threshold)) as patch:
        ours = family.run(pipe, steps=steps)
        report = patch.report()
    pipe, ran = family.pipe(), []
    Family.model(pipe).enable_cache(FirstBlockCacheConfig(threshold=threshold))
    describe(Family.model(pipe)).blocks[-1].attn.register_forward_hook(lambda *args: ran.append(1))
    theirs = family.run(pipe, steps=steps)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert len(ran) == report["computed"]
    assert threshold < 2.0 or report["reused"] > 0


def test_a_first_block_that_adds_nothing_computes():
    """The distance is 0 / 0 then. diffusers' hooks take that for no change, and never compute again."""
    pipe = FAMILIES["dit"].pipe()
    block = describe(pipe.transformer).blocks[0]
    block.module.forward = lambda *args, **kwargs: block.output(*block.streams(args, kwargs))
    plain = FAMILIES["dit"].run(pipe, steps=3)
    with first_block_cache.apply(pipe, first_block_cache.Config(threshold=0.5)) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe, steps=3), plain)
        assert patch.report()["computed"] == 3


def test_a_threshold_never_met_says_the_smallest_change():
    pipe = FAMILIES["dit"].pipe()
    with first_block_cache.apply(pipe, first_block_cache.Config(threshold=1e-6)) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe, steps=4), contract.plain("dit", steps=4))
        assert "changed by more than 1e-06 in every step; by 0." in patch.report()["reason"]
    with first_block_cache.apply(pipe, first_block_cache.Config(threshold=2.0, warmup=3)) as patch:
        FAMILIES["dit"].run(pipe, steps=3)
        assert patch.report()["reason"] == "the first steps compute, and those with a ControlNet or skipped layers"


def test_cost_falls_and_distance_grows_along_the_threshold():
    configs = (first_block_cache.Config(threshold=threshold) for threshold in (1e-6, 0.2, 0.5, 1e9))
    assert contract.costs_fall_and_distances_grow(first_block_cache, configs)[-1] == 1


@pytest.mark.parametrize("other", [None, tome], ids=["alone", "tome"])
def test_the_first_block_runs_once_unless_another_patch_stands_in_it(other):
    """Beside one that does, computed steps run it again, as that patch would have it; what decides is the plain block."""
    pipe, ran = FAMILIES["dit"].pipe(), []
    describe(pipe.transformer).blocks[0].ff.register_forward_hook(lambda *args: ran.append(1))
    with (other.apply(pipe, other.Config(ratio=0.5)) if other else nullcontext(),
          first_block_cache.apply(pipe, first_block_cache.TINY) as patch):
        FAMILIES["dit"].run(pipe, steps=6)
        report = patch.report()
    assert report["state"] == "engaged"
    assert len(ran) == 6 + (report["computed"] if other else 0)


@pytest.mark.parametrize("name", ["dit", "flux", "latte", "cogvideox"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(first_block_cache, first_block_cache.TINY, FAMILIES[name]), steps=6)
    assert all(report["reused"] > 0 for report in reports)


def test_one_block_is_refused():
    scheduler = diffusers.DDIMScheduler()
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                            num_layers=1, sample_size=8, num_embeds_ada_norm=10)
    pipe = diffusers.DiTPipeline(model, diffusers.AutoencoderKL(), scheduler)
    with pytest.raises(ValueError, match="has no second block to leave out"):
        first_block_cache.apply(pipe)


@pytest.mark.parametrize("bad", [{"threshold": -0.1}, {"warmup": -1}])
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match="must not be negative"):
        first_block_cache.Config(**bad)
