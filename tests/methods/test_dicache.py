import math

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import dicache
from methods._core.denoiser import describe
from methods._core.look import relative_change
from methods.dicache import Config, forced, gain


@pytest.mark.parametrize("check, case", contract.cases(dicache, dicache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def full_steps(config, changes):
    """By hand: the sum of changes since a full step reaches the threshold, or the step is forced. The first has no change."""
    full, total = [], 0.0
    for i, change in enumerate(changes):
        total += change or 0.0
        if i == 0 or forced(config, i, len(changes)) or not total < config.threshold:
            full.append(i)
            total = 0.0
    return full


def test_worked_examples():
    flux = full_steps(Config(threshold=0.4, ends=True), [None] + [0.06] * 29)
    assert flux == [0, 1, 2, 3, 4, 5, 6, 13, 20, 27, 29]
    wan = Config(threshold=0.08, clip=2.0)
    assert full_steps(wan, [None] + [0.03] * 49) == [*range(10), *range(12, 50, 3)]
    assert full_steps(Config(threshold=0.2, clip=2.0), [None] + [0.03] * 49) == [*range(10), 16, 23, 30, 37, 44]


@pytest.mark.parametrize("now, clip, g, residual", [(1.5, 1.5, 1.0, 14.0), (2.3, 1.5, 1.3, 15.2), (3.0, 1.5, 1.5, 16.0),
                                                    (3.0, 2.0, 2.0, 18.0), (0.0, 1.5, 1.0, 14.0)])
def test_the_residual_is_continued_by_the_share_of_the_probe(now, clip, g, residual):
    """Q = 1, 2 and R = 10, 14."""
    q = gain(*(torch.tensor([x]) for x in (now, 2.0, 1.0)), clip)
    assert q == pytest.approx(g) and 10 + q * 4 == pytest.approx(residual)


def test_a_probe_that_did_not_move_between_full_steps_is_plain_reuse():
    one, two = torch.ones(3), torch.full((3,), 2.0)
    assert gain(one, one, one, 1.5) == 1.0                          # 0 / 0, NaN in the official code
    assert gain(two, one, one, 1.5) == 1.5                          # without bound
    assert gain(torch.full((3,), math.nan), two, one, 1.5) == 1.0


@pytest.mark.parametrize("config", [Config(threshold=1.2, warmup=0.3), Config(threshold=1.2, warmup=0.3, clip=1.0),
                                    Config(threshold=2.0, warmup=0.0, beside_input=True, ends=True)],
                         ids=["aligned", "reuse", "beside_input"])
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "cogvideox"])
def test_whole_runs_are_those_of_a_loop(name, config, monkeypatch):
    """The blocks called one after the other by hand, deciding and continuing as the official loop does."""
    family = FAMILIES[name]
    pipe, ours = family.pipe(), family.pipe()
    with dicache.apply(ours, config) as patch:
        result = family.run(ours, steps=8)
        report = patch.report()
    assert torch.allclose(result, by_loop(family, pipe, config, 8), atol=2e-5)
    assert report["state"] == "engaged"


def by_loop(family, pipe, config, steps):
    """A run that computes all blocks in each step, and then gives in place of the last one's output what the rule says."""
    chain = describe(Family.model(pipe)).chain
    begin, end = chain[0].module.forward, chain[-1].module.forward
    now, before, window, total = {}, {}, [], [0.0]

    def first(*args, **kwargs):
        out = begin(*args, **kwargs)
        now.update(x=chain[0].streams(args, kwargs)[0].clone(), p=chain[0].split(out)[0], i=now.get("i", -1) + 1)
        return out

    def last(*args, **kwargs):
        out = end(*args, **kwargs)
        x, p, (y, text) = now["x"], now["p"], chain[-1].split(out)
        if before:
            change = relative_change(p, before["p"])
            total[0] += abs(change - relative_change(x, before["x"])) if config.beside_input else change
        full = not before or forced(config, now["i"], steps) or total[0] >= config.threshold
        before.update(x=x, p=p)
        if full:
            total[0] = 0.0
            window[:] = [*window[-1:], (y - x, p - x)]
            return out
        residual = window[-1][0]
        if len(window) == 2:
            (older, q2), (newer, q1) = window
            g = float(((p - x) - q2).abs().mean() / (q1 - q2).abs().mean())
            residual = older + min(max(g, 1.0), config.clip) * (newer - older)
        return chain[-1].output(x + residual, text)

    chain[0].module.forward, chain[-1].module.forward = first, last
    return family.run(pipe, steps=steps)


def test_a_skipped_step_runs_the_probe_alone_and_a_full_one_each_block_once():
    pipe, ran = FAMILIES["dit"].pipe(), []
    chain = describe(pipe.transformer).chain
    for block in chain:
        block.attn.register_forward_hook(lambda module, *args: ran.append(module))
    with dicache.apply(pipe, Config(threshold=1e9, probe=2, warmup=0.5)) as patch:
        FAMILIES["dit"].run(pipe, steps=8)
        assert (patch.report()["computed"], patch.report()["reused"]) == (4, 4)
    assert [ran.count(block.attn) for block in chain] == [8] * 2 + [4] * (len(chain) - 2)


def test_a_threshold_never_met_says_the_smallest_change():
    pipe = FAMILIES["dit"].pipe()
    with dicache.apply(pipe, Config(threshold=1e-6, warmup=0.0)) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe, steps=4), contract.plain("dit", steps=4))
        assert "reached 1e-06 in every step; the smallest was 0." in patch.report()["reason"]
    with dicache.apply(pipe, Config(warmup=1.0)) as patch:
        FAMILIES["dit"].run(pipe, steps=3)
        assert patch.report()["state"] == "no gain"


def test_cost_falls_and_distance_grows_along_the_threshold():
    configs = (Config(threshold=threshold, warmup=0.2) for threshold in (1e-6, 0.8, 2.0, 1e9))
    assert contract.costs_fall_and_distances_grow(dicache, configs)[-1] == 2


@pytest.mark.parametrize("name", ["dit", "flux", "latte", "cogvideox"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(dicache, dicache.TINY, FAMILIES[name]), steps=6)
    assert all(report["reused"] > 0 for report in reports)


def test_a_probe_of_all_blocks_is_refused():
    with pytest.raises(ValueError, match="has no block behind the probe"):
        dicache.apply(FAMILIES["dit"].pipe(), Config(probe=3))


@pytest.mark.parametrize("bad, said", [({"threshold": -0.1}, "not be negative"), ({"probe": 0}, "at least 1"),
                                       ({"warmup": 1.1}, "within"), ({"clip": 0.9}, "at least 1")])
def test_bad_values_are_named(bad, said):
    with pytest.raises(ValueError, match=said):
        Config(**bad)
