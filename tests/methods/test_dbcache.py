import math
from dataclasses import replace

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import dbcache, first_block_cache, tome
from methods._core.denoiser import describe
from methods._core.patch import Patch
from methods.dbcache import Config, Rule

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]


@pytest.mark.parametrize("check, case", contract.cases(dbcache, dbcache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def reused(config, changes):
    """The steps that a rule leaves out, of these changes; None where there is nothing to compare with."""
    rule, left_out = Rule(), []
    for i, change in enumerate(changes):
        due = rule.due(config, i, change)
        rule = rule.after(due, change)
        left_out += [] if due else [i]
    return left_out


ALIKE = [None] + [0.01] * 18


def test_warm_up_is_strictly_less_and_may_have_holes():
    assert reused(Config(warmup=4), ALIKE) == list(range(4, 19))
    assert reused(Config(warmup=4, warmup_interval=2), ALIKE) == [1, 3, *range(4, 19)]
    assert reused(Config(warmup=0), ALIKE) == list(range(1, 19))       # the first step has nothing to compare with


def test_one_in_a_row_alternates():
    """A run of 19 steps."""
    assert reused(Config(warmup=4, max_running=1), ALIKE) == [4, 6, 8, 10, 12, 14, 16, 18]
    assert reused(Config(warmup=4, max_running=3), ALIKE) == [4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18]


def test_bounds_in_all():
    assert reused(Config(warmup=4, max_reused=5), ALIKE) == [4, 5, 6, 7, 8]
    assert reused(Config(warmup=1, max_total=0.0345), ALIKE) == [1, 2, 3, 4]      # the sum is looked at before the step


def test_the_threshold_is_strict_and_one_takes_all():
    changes = [None, 0.08, 0.0799, 0.09, math.nan]
    assert reused(Config(warmup=0), changes) == [2]
    assert reused(Config(warmup=0, threshold=1.0), changes) == [1, 2, 3, 4]
    assert reused(Config(warmup=0, threshold=0.0), changes) == []


def test_masks():
    mask = (1, 1, 0, 0, 1, 0)
    changes = [None, 0.01, 0.01, 0.5, 0.01, 0.01]
    assert reused(Config(mask=mask), changes) == [2, 5]                           # the warm-up ends where the ones do
    assert reused(Config(mask=mask, static=True), [None] * 6) == [2, 3, 5]
    assert reused(Config(mask=(1,) * 6), changes) == []


@pytest.mark.parametrize("name", CHAINS)
def test_one_block_and_no_warm_up_is_first_block_cache(name):
    family = FAMILIES[name]
    threshold = 0.2 if name == "cogvideox" else 0.95
    runs = {}
    for method, config in ((dbcache, Config(first=1, warmup=0, threshold=threshold)),
                           (first_block_cache, first_block_cache.Config(threshold=threshold))):
        pipe = family.pipe()
        with method.apply(pipe, config) as patch:
            runs[method] = family.run(pipe, steps=8)
            assert patch.report()["reused"] > 0
    assert torch.equal(*runs.values())


@pytest.mark.parametrize("name", ["dit", "flux", "latte"])
def test_the_ends_always_run_and_the_middle_is_added_to_a_fresh_start(name):
    """Block evaluations are L + (T - 1) (n + m), and what enters the last block is x1 of that step with one sum."""
    family = FAMILIES[name]
    pipe = family.pipe()
    chain, ran, starts, ends = describe(Family.model(pipe)).chain, [], [], []
    with dbcache.apply(pipe, Config(first=1, last=1, warmup=1, threshold=1.0)) as patch:
        for block in chain[1:]:
            block.attn.register_forward_hook(lambda *args: ran.append(1))
        chain[1].module.register_forward_pre_hook(
            lambda module, args, kwargs: starts.append(chain[1].streams(args, kwargs)[0]), with_kwargs=True)
        chain[-1].module.register_forward_pre_hook(
            lambda module, args, kwargs: ends.append(chain[-1].streams(args, kwargs)[0]), with_kwargs=True)
        family.run(pipe, steps=4)
        report = patch.report()
    calls = report["computed"]
    assert report["reused"] == 3 * calls and len(ran) == calls * (len(chain) - 1 + 3)
    assert report["saved"] == pytest.approx(0.75 * (len(chain) - 2) / len(chain), abs=1e-3)
    for call in range(calls):
        mine, behind = starts[call::calls], ends[call::calls]
        if mine[0].shape == behind[0].shape:                             # Latte lays its tokens out anew between blocks
            for step in (1, 2, 3):
                assert not torch.equal(mine[step], mine[0])
                torch.testing.assert_close(behind[step] - mine[step], behind[0] - mine[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dit", "flux", "cogvideox"])
def test_static_steps_are_left_out_without_a_look(name, monkeypatch):
    family = FAMILIES[name]
    pipe = family.pipe()
    monkeypatch.setattr(Patch, "run_first", None)
    with dbcache.apply(pipe, Config(first=1, mask=(1, 0, 1, 0, 0), static=True)) as patch:
        family.run(pipe, steps=5)
        report = patch.report()
    assert report["reused"] == 1.5 * report["computed"]


def test_a_mask_of_another_length_is_refused_before_the_first_step():
    pipe = FAMILIES["dit"].pipe()
    with dbcache.apply(pipe, Config(first=1, mask=(1, 0), static=True)), \
            pytest.raises(ValueError, match="the mask is for 2 steps, this run has 3"):
        FAMILIES["dit"].run(pipe, steps=3)


def test_a_warm_up_as_long_as_the_run_changes_nothing():
    pipe = FAMILIES["dit"].pipe()
    with dbcache.apply(pipe, replace(dbcache.TINY, warmup=4)) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe, steps=4), contract.plain("dit", steps=4))
        assert patch.report()["state"] == "no gain"


def test_no_middle_is_refused():
    with pytest.raises(ValueError, match="first=8 and last=0 leave none of 3 blocks between them"):
        dbcache.apply(FAMILIES["dit"].pipe())


def test_cost_falls_and_distance_grows_along_the_threshold():
    configs = (Config(first=1, last=1, warmup=1, threshold=threshold) for threshold in (1e-6, 0.2, 0.5, 1.0))
    assert contract.costs_fall_and_distances_grow(dbcache, configs)[-1] == 1


@pytest.mark.parametrize("name", ["dit", "flux", "latte", "cogvideox"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(dbcache, dbcache.TINY, FAMILIES[name]), steps=6)
    assert all(report["reused"] > 0 for report in reports)


def test_beside_a_patch_in_the_first_blocks():
    pipe = FAMILIES["dit"].pipe()
    with tome.apply(pipe, tome.Config(ratio=0.5)), dbcache.apply(pipe, replace(dbcache.TINY, first=2)) as patch:
        FAMILIES["dit"].run(pipe, steps=6)
        assert patch.report()["state"] == "engaged"


@pytest.mark.parametrize("bad, said", [
    ({"first": 0}, "at least 1"), ({"last": -1}, "not negative"), ({"threshold": -0.1}, "not be negative"),
    ({"warmup": -1}, "not be negative"), ({"warmup_interval": 0}, "at least 1"), ({"mask": (2,)}, "of 0 and 1"),
    ({"static": True}, "needs a mask"),
])
def test_bad_values_are_named(bad, said):
    with pytest.raises(ValueError, match=said):
        Config(**bad)
