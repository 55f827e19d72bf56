import json
from itertools import pairwise

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import fora, smoothcache
from methods._core.denoiser import describe
from methods._core.schedule import means
from methods.smoothcache import Config, scan, schedule

# lag 1, 2 and 3 over eight steps
ERRORS = [[.1, .1, .3, .1, .1, .1, .3], [.2, .4, .4, .15, .2, .4], [.3, .5, .5, .18, .4]]


@pytest.mark.parametrize("check, case", contract.cases(smoothcache, smoothcache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def constant(error, steps, lags):
    return [[error] * (steps - lag) for lag in range(1, lags + 1)]


def test_the_longest_lag_within_the_threshold_is_reused():
    assert scan(ERRORS, 0.18) == "10110001"                   # three at step 3: equal is within
    assert scan(ERRORS, 0.17) == "10110011"                   # two there, and the last step computes
    assert scan(ERRORS, -1.0) == "1" * 8
    assert scan(constant(5.0, 50, 3), float("inf")) == "1000" * 12 + "11"
    assert scan(constant(5.0, 50, 3), float("inf")).count("1") == 14
    assert scan(constant(0.1, 9, 1), 0.2) == "101010101" and scan(constant(0.1, 8, 1), 0.2) == "10101011"
    assert scan([[float("nan")] * 3], 0.5) == "1111"          # of what is nothing in both steps the change is 0 / 0


def test_only_the_lag_itself_is_held_against_the_threshold():
    assert scan([[9.0] * 4, [9.0] * 3, [0.1] * 2], 0.2) == "10001"


def test_the_published_schedule():
    """50-N-3-threshold-0.18.json: 24 of 50 steps."""
    assert dict(Config().schedule) == {"attn": (smoothcache.WORD,), "ff": (smoothcache.WORD,)}
    assert smoothcache.WORD.startswith("1000100100101010") and smoothcache.WORD.endswith("1011")
    assert len(smoothcache.WORD) == 50 and smoothcache.WORD.count("1") == 24


def by_hand(name, steps, lags):
    """(kind of branch -> rows of errors) of the first call in each step, by hooks on the branches and slow loops."""
    family = FAMILIES[name]
    pipe = family.pipe()
    blocks, outputs = describe(Family.model(pipe)).blocks, {}
    for block in blocks:
        for branch in block.branches:
            branch.module.register_forward_hook(
                lambda m, args, out, key=(branch.name, block.index): outputs.setdefault(key, []).append(out))
    plain = family.run(pipe, steps=steps, batch=2)
    rows = {}
    for kind in dict.fromkeys(kind for kind, _ in outputs):
        of_kind = [seen for (other, _), seen in outputs.items() if other == kind]
        for lag in range(1, lags + 1):
            row = []
            for t in range(steps - lag):
                found = []
                for seen in of_kind:
                    old, new = (torch.cat([x.flatten() for x in (out if isinstance(out, tuple) else (out,))])
                                for out in (seen[t], seen[t + lag]))
                    found.append(float((old - new).abs().sum() / new.abs().sum()))
                row.append(sum(found) / len(found))
            rows.setdefault(kind, []).append(row)
    return rows, plain


@pytest.mark.parametrize("name, kinds", [("dit", {"attn", "ff"}), ("pixart", {"attn", "cross", "ff"}),
                                         ("sd3", {"attn", "ff", "ff_context"}),
                                         ("flux", {"attn", "ff", "ff_context", "total"})])
def test_what_is_observed_is_the_mean_error_over_blocks(name, kinds):
    changes, family = {}, FAMILIES[name]
    rows, plain = by_hand(name, 6, 3)
    pipe = family.pipe()
    with smoothcache.observe(pipe, changes) as patch:
        assert torch.equal(family.run(pipe, steps=6, batch=2), plain)
        assert patch.report()["observed"] == sum(map(len, changes.values()))
    found = means(changes)
    assert set(found) == set(rows) == kinds
    for kind, of_kind in rows.items():
        for row, expected in zip(found[kind], of_kind, strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
    words = schedule(changes, 0.6)
    assert words == {kind: scan(of_kind, 0.6) for kind, of_kind in rows.items()} and set(map(len, words.values())) == {6}


def test_a_schedule_comes_from_a_file_and_the_blocks_run_by_it(tmp_path):
    family, path = FAMILIES["pixart"], tmp_path / "schedule.json"
    path.write_text(json.dumps({"attn": "1011001", "ff": "1100101"}))
    pipe = family.pipe()
    blocks, ran = pipe.transformer.transformer_blocks, {}
    for kind, module in (("attn", blocks[1].attn1), ("cross", blocks[1].attn2), ("ff", blocks[0].ff)):
        inner = next(part for part in module.modules() if isinstance(part, torch.nn.Linear))
        inner.register_forward_hook(lambda m, args, out, kind=kind: ran.setdefault(kind, []).append(1))
    with smoothcache.apply(pipe, Config(schedule=path)) as patch:
        family.run(pipe, steps=7)
        report = patch.report()
    assert {kind: len(calls) for kind, calls in ran.items()} == {"attn": 4, "cross": 7, "ff": 4}           # cross is not named
    assert (report["computed"], report["reused"]) == (8 * len(blocks), 6 * len(blocks))
    assert report["saved"] == pytest.approx(6 / 14, abs=1e-4)


def test_what_is_reused_is_the_output_of_the_last_step_that_computed():
    pipe, given = FAMILIES["dit"].pipe(), []
    block = pipe.transformer.transformer_blocks[1]
    with smoothcache.apply(pipe, Config(schedule={"ff": "100110"})):
        forward = block.ff.forward
        block.ff.forward = lambda *args, **kwargs: (given.append(forward(*args, **kwargs)), given[-1])[1]
        FAMILIES["dit"].run(pipe, steps=6)
        block.ff.forward = forward
    same = [torch.equal(a, b) for a, b in pairwise(given)]
    assert same == [True, True, False, False, True]


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_fixed_schedule_is_fora(name):
    family, outs = FAMILIES[name], []
    word = "".join("10"[not fora.computes(i, 8, 3, "start")] for i in range(8))
    kinds = {branch.name for block in describe(Family.model(family.pipe())).blocks for branch in block.branches}
    for method, config in ((fora, fora.Config(interval=3, count_from="start")),
                           (smoothcache, Config(schedule=dict.fromkeys(kinds, word)))):
        pipe = family.pipe()
        with method.apply(pipe, config):
            outs.append(family.run(pipe, steps=8))
    assert torch.equal(*outs)


def test_cost_falls_and_distance_grows_along_the_threshold():
    pipe, changes, family = FAMILIES["dit"].pipe(), {}, FAMILIES["dit"]
    with smoothcache.observe(pipe, changes):
        plain = family.run(pipe, steps=12)
    saved, distances = [], []
    for threshold in (-1.0, 0.45, 0.8, 9.0):
        with smoothcache.apply(pipe, Config(schedule=schedule(changes, threshold))) as patch:
            distances.append(float((family.run(pipe, steps=12) - plain).square().mean()))
            saved.append(patch.report()["saved"])
    assert saved == sorted(saved) and saved[0] == 0 < saved[1] < saved[2] < saved[3]
    assert distances == sorted(distances) and distances[0] == 0 < distances[1]


def test_a_run_of_another_length_is_refused_and_the_next_one_is_as_the_first():
    pipe, family = FAMILIES["dit"].pipe(), FAMILIES["dit"]
    with smoothcache.apply(pipe, Config(schedule={"attn": ["1010", "11"]})) as patch:
        first = family.run(pipe, steps=4)
        with pytest.raises(ValueError, match="smoothcache: the schedule is for 2, 4 steps, and this run has 5"):
            family.run(pipe, steps=5)
        assert torch.equal(family.run(pipe, steps=4), first)
        family.run(pipe, steps=2)
        assert patch.report()["reason"] == "the schedule computes every step of this run"


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="lags=0 must be at least 1"):
        smoothcache.observe(FAMILIES["dit"].pipe(), {}, 0)
    with pytest.raises(ValueError, match="nothing was observed"):
        schedule({}, 0.2)
    with pytest.raises(ValueError, match="has no branch of kind mlp"):
        smoothcache.apply(FAMILIES["dit"].pipe(), Config(schedule={"mlp": "10"}))
    with pytest.raises(ValueError, match=r"on a UNet use block_caching"):
        smoothcache.apply(FAMILIES["unet"].pipe())
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        smoothcache.apply(FAMILIES["dit"].pipe().transformer)


@pytest.mark.parametrize("name", ["dit", "flux", "cogvideox"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(smoothcache, smoothcache.TINY, FAMILIES[name]), steps=4)
    assert all(report["reused"] > 0 for report in reports)
