import numpy as np
import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from methods import pfdiff, teacache
from methods._core.patch import Patch

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]


@pytest.mark.parametrize("check, case", contract.cases(teacache, teacache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def schedule(changes, coefficients, threshold):
    """Which of len(changes) + 2 steps compute, by hand: the first, the last, and those that reach the threshold."""
    computed, total = [0], 0.0
    for step, change in enumerate(changes, 1):
        due, total = teacache.accumulate(total, change, coefficients, threshold)
        computed += [step] * due
    return [*computed, len(changes) + 1]


@pytest.mark.parametrize("change, expected", [(0.0, 0.26423), (0.05, 0.18050), (0.1, 0.20685), (0.2, 0.26200)])
def test_the_polynomial_of_flux(change, expected):
    assert teacache.accumulate(0.0, change, teacache.COEFFICIENTS["flux"], 9.0) == (False, pytest.approx(expected, abs=1e-5))


@pytest.mark.parametrize("threshold, count", [(0.25, 15), (0.4, 10), (0.6, 8), (0.8, 7)])
def test_a_steady_change_makes_an_even_schedule(threshold, count):
    assert len(schedule([0.05] * 26, teacache.COEFFICIENTS["flux"], threshold)) == count


def test_the_sum_starts_anew_after_computing_and_may_fall():
    assert schedule([0.2, 0.2, 0.2, 0.5, 0.1], (1.0, 0.0), 0.5) == [0, 3, 4, 6]
    assert teacache.accumulate(0.3, 0.1, (1.0, -0.2), 0.25) == (False, pytest.approx(0.2))
    assert teacache.accumulate(0.0, 0.25, (1.0, 0.0), 0.25) == (True, 0.0)


def test_the_change_is_relative_to_the_step_before():
    old, new = torch.tensor([[1.0, -1.0], [2.0, 0.0]]), torch.tensor([[1.5, -1.0], [2.0, 0.5]])
    assert teacache.relative_change(new, old) == 0.25
    assert teacache.relative_change(8 * new, 8 * old) == 0.25 == teacache.relative_change(new.flip(0), old.flip(0))


def watched(pipe):
    """A patch that keeps the modulated input of every call and whether blocks then run, by branch."""
    patch, signals, ran = Patch(pipe, "watch"), {}, {}

    def note(context):
        signals.setdefault(context.branch, []).append(patch.look(context))
        ran.setdefault(context.branch, []).append(patch.reaches(patch.denoiser.blocks[0].attn))

    patch.each_call(note)
    return patch, signals, ran


@pytest.mark.parametrize("name, solver", [*((name, False) for name in CHAINS), *((name, True) for name in CHAINS[:4])])
def test_blocks_run_when_the_changes_add_up(name, solver):
    """Compared with the changes that another patch sees; also where a solver moves the latent before the call."""
    family = FAMILIES[name]
    pipe = family.pipe()
    mover = pfdiff.apply(pipe) if solver else None
    config = teacache.Config(threshold=0.7, coefficients=(1.0, 0.0))
    with teacache.apply(pipe, config) as patch:
        watch, signals, ran = watched(pipe)
        with watch.on():
            family.run(pipe, steps=15 if solver else 9)
        assert patch.report()["state"] == "engaged"
    for branch, seen in signals.items():
        changes = [teacache.relative_change(new, old) for old, new in zip(seen, seen[1:], strict=False)][:-1]
        assert [i for i, runs in enumerate(ran[branch]) if runs] == schedule(changes, (1.0, 0.0), 0.7)
    if mover:
        mover.remove()


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_reused_is_what_the_blocks_added(name):
    """In a step that is left out, what enters the tail differs from what entered the blocks by the residual kept."""
    case = contract.Case(teacache, teacache.Config(threshold=1e9), FAMILIES[name])
    for before, after in contract.around_the_blocks(case, steps=4)[0]:
        for step in (1, 2):
            torch.testing.assert_close(after[step] - before[step], after[0] - before[0], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(after[3] - before[3], after[0] - before[0], atol=1e-3)


def test_the_first_and_the_last_step_compute():
    pipe = FAMILIES["dit"].pipe()
    with teacache.apply(pipe, teacache.Config(threshold=1e9)) as patch:
        for steps in (1, 2, 3, 7):
            out = FAMILIES["dit"].run(pipe, steps=steps)
            assert patch.report()["computed"] == min(steps, 2)
            assert steps > 2 or torch.equal(out, contract.plain("dit", steps=steps))
        FAMILIES["dit"].run(pipe, steps=2)
        assert patch.report()["reason"] == "the first step, the last, and those with a ControlNet always compute"


def test_a_threshold_that_is_always_reached_is_no_gain_and_says_what_it_saw():
    pipe = FAMILIES["dit"].pipe()
    with teacache.apply(pipe, teacache.Config(threshold=0.001)) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe), contract.plain("dit", steps=4))
        report = patch.report()
    assert report["state"] == "no gain" and "reached 0.001 in every step; the smallest change seen was 0." in report["reason"]


def test_families_without_a_polynomial_take_the_change_itself():
    for name, coefficients in {"dit": (1.0, 0.0), **teacache.COEFFICIENTS}.items():
        outs = []
        for given in (None, coefficients):
            pipe = FAMILIES[name].pipe()
            with teacache.apply(pipe, teacache.Config(threshold=1.0, coefficients=given)):
                outs.append(FAMILIES[name].run(pipe, steps=7))
        assert torch.equal(*outs)


def test_what_is_observed_can_be_fitted():
    pairs, pipe = [], FAMILIES["dit"].pipe()
    with teacache.observe(pipe, pairs) as patch:
        plain = FAMILIES["dit"].run(pipe, steps=8)
        assert patch.report()["observed"] == len(pairs) == 7 and min(map(min, pairs)) > 0
    assert torch.equal(plain, FAMILIES["dit"].run(pipe, steps=8))
    found = teacache.fit(pairs)
    assert found == pytest.approx(np.polyfit([x for x, _ in pairs], [y for _, y in pairs], 4))
    assert teacache.fit([(x, 2 * x - 1) for x in (0.0, 0.5, 1.0)], 1) == pytest.approx((2, -1))
    with pytest.raises(ValueError, match="4 pairs do not fix"):
        teacache.fit(pairs[:4])
    with pytest.raises(ValueError, match="has no chain"):
        teacache.observe(FAMILIES["unet"].pipe(), [])


@pytest.mark.parametrize("name", ["dit", "flux", "latte", "cogvideox"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(teacache, teacache.TINY, FAMILIES[name]), steps=6)
    assert all(report["reused"] > 0 for report in reports)


def test_a_bare_model_is_refused():
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        teacache.apply(FAMILIES["dit"].pipe().transformer)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="threshold=-1.0"):
        teacache.Config(threshold=-1.0)


def test_cost_falls_and_distance_grows_along_the_threshold():
    configs = (teacache.Config(threshold=threshold, coefficients=(1.0, 0.0)) for threshold in (1e-6, 0.5, 1.2, 1e9))
    assert contract.costs_fall_and_distances_grow(teacache, configs)[-1] == 2
