import math
from itertools import accumulate

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import block_caching
from methods._core.schedule import means
from methods.block_caching import Config, change, schedule, word


@pytest.mark.parametrize("check, case", contract.cases(block_caching, block_caching.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def at(found):
    return [i for i, each in enumerate(found) if each == "1"]


def test_a_value_lasts_until_the_changes_sum_up():
    assert at(word([0.2] * 19, 0.5)) == list(range(0, 20, 3))
    assert at(word([0.2] * 19, 0.5, early=True)) == list(range(0, 20, 2))
    changes = [.4, .1, .1, .1, .3, .3, .05, .05, .05]
    assert at(word(changes, 0.52)) == [0, 3, 6] and at(word(changes, 0.52, early=True)) == [0, 2, 5]
    assert word([0.0, 0.3], -1.0) == "111" and word([9.0] * 4, math.inf) == "10000" and word([], 0.5) == "1"


def test_the_words_are_those_of_the_equation_taken_literally():
    """Recompute at the first step b for which the changes of a, ..., b - 1 are more than delta; early: of a, ..., b."""
    random = torch.Generator().manual_seed(0)
    for early in (False, True):
        for delta in (0.3, 0.7, 1.9):
            changes = torch.rand(40, generator=random).tolist()
            computed, a = [0], 0
            for b in range(1, 41):
                if sum(changes[a:b + early]) > delta:
                    computed.append(b)
                    a = b
            assert at(word(changes, delta, early)) == computed


def test_more_drift_never_computes_more():
    random = torch.Generator().manual_seed(1)
    for _ in range(20):
        changes = torch.rand(30, generator=random).tolist()
        counts = [word(changes, delta).count("1") for delta in (-1.0, 0.2, 0.5, 1.0, 2.0, 4.0, math.inf)]
        assert counts == sorted(counts, reverse=True) and counts[0] == 31 and counts[-1] == 1


def test_the_change_is_relative_to_the_earlier_step():
    old, new = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
    assert change(old, new) == 1.0 and change(new, old) == 0.5 == change(3 * new, 3 * old)
    nothing = torch.zeros(2)
    assert change(nothing, nothing) == 0.0 and change(nothing, new) == math.inf and change(new, nothing) == 1.0


def test_the_published_schedule():
    """Block 1 of the input of LDM-512 computes in steps 1, 6, 10, 14 and 18 of 20."""
    assert [i + 1 for i in at(block_caching.TWENTY["0"])] == [1, 6, 10, 14, 18] and len(block_caching.TWENTY["0"]) == 20
    assert dict(Config().schedule) == {"0": (block_caching.TWENTY["0"],)}


def transformers(unet):
    """The spatial transformers in the order in which the network runs them."""
    stages = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [module for stage in stages for module in getattr(stage, "attentions", ())]


class ByHand:
    """Stands in place of a module's forward, with a counter of its own and lists."""

    def __init__(self, module, given):
        self.module, self.given, self.forward = module, given, module.forward
        self.step, self.branch, self.seen = 0, None, []
        module.forward = self

    def __call__(self, *args, **kwargs):
        i, self.step = self.step, self.step + 1
        x = args[0] if args else kwargs["hidden_states"]
        if self.given[i] == "1":
            self.branch = self.forward(*args, **kwargs)[0] - x
        self.seen.append(self.branch)
        return (self.branch + x,)


@pytest.mark.slow
@pytest.mark.parametrize("name, steps, seed, size", [
    ("unet", 3, 0, 0), ("unet", 8, 1, 1), ("unet", 13, 2, 1), ("sdxl", 3, 0, 0), ("sdxl", 8, 1, 1), ("animatediff", 3, 0, 0)])
def test_whole_runs_equal_a_program_by_hand(name, steps, seed, size):
    family, random = FAMILIES[name], torch.Generator().manual_seed(seed)
    setting = {"steps": steps, "batch": 2 if name != "animatediff" else 1, "size": family.sizes[size]}
    pipe, other = family.pipe(), family.pipe()
    for each in (pipe, other):
        Family.model(each).double()
    places = transformers(Family.model(other))
    given = {str(n): "1" + "".join("01"[int(x)] for x in torch.randint(2, (steps - 1,), generator=random))
             for n in range(len(places))}
    with block_caching.apply(pipe, Config(schedule=given)) as patch:
        ours = family.run(pipe, **setting)
        report = patch.report()
    for n, module in enumerate(places):
        ByHand(module, given[str(n)])
    torch.testing.assert_close(ours, family.run(other, **setting), atol=1e-9, rtol=1e-9)
    reused = sum(each.count("0") for each in given.values())
    assert (report["reused"], report["computed"]) == (reused, steps * len(places) - reused)
    assert report["saved"] == pytest.approx(reused / (steps * len(places)), abs=1e-4)


@pytest.mark.parametrize("name", ["unet", "sdxl"])
def test_what_is_observed_are_the_changes_of_the_branches(name):
    family, changes = FAMILIES[name], {}
    pipe, other = family.pipe(), family.pipe()
    with block_caching.observe(pipe, changes) as patch:
        for seed in (0, 1):
            family.run(pipe, steps=7, seed=seed)
        assert patch.report()["state"] == "engaged"
    seen = []
    for seed in (0, 1):
        hands = [ByHand(module, "1" * 7) for module in transformers(Family.model(other))]
        family.run(other, steps=7, seed=seed)
        seen.append([hand.seen for hand in hands])
        for hand in hands:
            hand.module.forward = hand.forward
    found = means(changes)
    assert list(found) == sorted(map(str, range(len(seen[0]))))
    for n in range(len(seen[0])):
        expected = [sum(float((run[n][t + 1] - run[n][t]).abs().sum() / run[n][t].abs().sum()) for run in seen) / 2
                    for t in range(6)]
        assert found[str(n)] == [pytest.approx(expected, rel=1e-4)]
        assert schedule(changes, 0.5)[str(n)] == word(expected, 0.5)


@pytest.mark.parametrize("name", ["dit", "flux", "latte"])
def test_in_a_chain_a_block_adds_what_it_added(name):
    family, added = FAMILIES[name], []
    pipe = family.pipe()
    with block_caching.apply(pipe, Config(schedule={"1": "10010"})) as patch:
        block = patch.denoiser.blocks[1]
        forward = block.module.forward

        def note(*args, **kwargs):
            before = block.streams(args, kwargs)[0].clone()
            out = forward(*args, **kwargs)
            added.append(block.split(out)[0] - before)
            return out

        block.module.forward = note
        family.run(pipe, steps=5)
        block.module.forward = forward
    calls = len(added) // 5
    kept = added[::calls]
    for i, source in ((1, 0), (2, 0), (4, 3)):
        torch.testing.assert_close(kept[i], kept[source], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(kept[3], kept[0], atol=1e-2)


def test_no_attention_or_mlp_of_a_cached_block_runs():
    family = FAMILIES["unet"]
    pipe, ran = family.pipe(), []
    inner = transformers(pipe.unet)[0]
    for part in (inner.transformer_blocks[0].attn1, inner.transformer_blocks[0].ff, inner.proj_in):
        part.register_forward_hook(lambda *_: ran.append(1))
    with block_caching.apply(pipe, Config(schedule={"0": "1000100"})):
        family.run(pipe, steps=7)
    assert len(ran) == 3 * 2


def test_cost_falls_and_distance_grows_along_the_threshold():
    family, changes = FAMILIES["unet"], {}
    pipe = family.pipe()
    with block_caching.observe(pipe, changes):
        plain = family.run(pipe, steps=10)
    sums = sorted(max(accumulate(rows[0])) for rows in means(changes).values())
    saved, distances = [], []
    for delta in (-1.0, 0.3 * sums[0], sums[0], 9 * sums[-1]):
        with block_caching.apply(pipe, Config(schedule=schedule(changes, delta))) as patch:
            distances.append(float((family.run(pipe, steps=10) - plain).square().mean()))
            saved.append(patch.report()["saved"])
    assert saved == sorted(saved) and saved[0] == 0 < saved[1] < saved[3] == 0.9
    assert distances == sorted(distances) and distances[0] == 0 < distances[1]


def test_a_schedule_is_the_same_whatever_is_drawn_beside_it():
    """One word serves both halves of guidance, and every prompt of a batch."""
    family = FAMILIES["unet"]
    pipe = family.pipe()
    with block_caching.apply(pipe, Config(schedule={"0": "1010", "3": "1001"})) as patch:
        for setting in ({"guidance": 1.0}, {"batch": 3}, {"seed": 4}):
            family.run(pipe, steps=4, **setting)
            assert patch.report()["reused"] == 4


def test_a_run_of_another_length_is_refused():
    pipe, family = FAMILIES["unet"].pipe(), FAMILIES["unet"]
    with block_caching.apply(pipe) as patch:
        with pytest.raises(ValueError, match="block_caching: the schedule is for 20 steps, and this run has 5"):
            family.run(pipe, steps=5)
        family.run(pipe, steps=20)
        assert patch.report()["reused"] == 15


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="nothing was observed"):
        schedule({})
    for number in ("40", "x", "-1"):
        with pytest.raises(ValueError, match=f"the schedule names block {number}; this UNet2DConditionModel has blocks 0 to"):
            block_caching.apply(FAMILIES["unet"].pipe(), Config(schedule={number: "10"}))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        block_caching.apply(FAMILIES["unet"].pipe().unet)


@pytest.mark.slow
def test_blocks_compile_whole():
    reports = contract.compiled_blocks_agree(contract.Case(block_caching, block_caching.TINY, FAMILIES["flux"]), steps=4)
    assert all(report["reused"] > 0 for report in reports)
