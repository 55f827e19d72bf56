import math

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from accel_kernels import merge
from methods import tofu, tome
from methods._core import tokens
from methods._core.denoiser import describe
from methods._core.tokens import match_plan


@pytest.mark.parametrize("check, case", contract.cases(tofu, tofu.Config(ratio=0.5)), ids=contract.name)
def test_contract(check, case):
    check(case)


def plan_of(x, height, width, ratio, random=None):
    dst = tokens.destinations(1, height, width, 2, random)
    free = torch.ones(height * width, dtype=torch.bool).index_fill_(0, dst, False)
    return match_plan(x, free.nonzero()[:, 0], dst, tokens.reduction(height * width, len(dst), ratio))


def groups(plan, sample):
    return [(plan.segments.source[sample] == row).nonzero()[:, 0] for row in range(plan.segments.length)]


def test_worked_by_hand():
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [1, 1]]])                 # t0, t1 and t3 form one group
    rows = tofu.mlerp(plan_of(x, 2, 2, 0.5), x)
    torch.testing.assert_close(rows, torch.tensor([[[0.0, 1], [1.341641, 0.447214]]]))


def test_the_mean_is_divided_by_its_own_norm():
    x = torch.tensor([[[1.0, 0], [1, 1], [-1, 0]]])                        # by the destination's: (1.41421, 0.70711)
    rows = tofu.mlerp(match_plan(x, torch.tensor([1, 2]), torch.tensor([0]), 1), x)
    torch.testing.assert_close(rows[0, -1], torch.tensor([1.26491, 0.63246]), atol=1e-5, rtol=0)


def test_mlerp_does_not_depend_on_the_order_of_a_group():
    x, order = torch.randn(2, 48, 8, dtype=torch.float64), torch.randperm(48)
    plan = plan_of(x, 8, 6, 0.6)
    shuffled = plan._replace(segments=merge.segments(plan.segments.source[:, order], plan.segments.length))
    torch.testing.assert_close(tofu.mlerp(shuffled, x[:, order]), tofu.mlerp(plan, x))


def test_mlerp_is_the_direction_of_the_mean_with_the_largest_norm():
    x = torch.randn(2, 48, 8, dtype=torch.float64)
    plan = plan_of(x, 8, 6, 0.6, torch.Generator().manual_seed(0))
    rows = tofu.mlerp(plan, x)
    for b in range(2):
        for row, members in enumerate(groups(plan, b)):
            mean, norms = x[b, members].mean(0), x[b, members].norm(dim=-1)
            torch.testing.assert_close(rows[b, row], norms.max() * mean / mean.norm())
            torch.testing.assert_close(rows[b, row].norm(), norms.max())
            if len(members) == 1:
                assert torch.equal(rows[b, row], x[b, members[0]])
    assert (rows.norm(dim=-1) >= plan.reduce(x).norm(dim=-1) - 1e-12).all()
    torch.testing.assert_close(tofu.mlerp(plan, 3 * x), 3 * rows)


def test_two_unit_vectors_meet_at_the_middle_of_the_arc():
    a, b = torch.tensor([1.0, 0]), torch.tensor([math.cos(1.0), math.sin(1.0)])
    x = torch.stack([a, b, -a, -b])[None]
    plan = match_plan(x, torch.tensor([1, 2, 3]), torch.tensor([0]), 1)
    torch.testing.assert_close(tofu.mlerp(plan, x)[0, -1], torch.tensor([math.cos(0.5), math.sin(0.5)]))


def test_opposite_and_zero_tokens_stay_finite():
    x = torch.tensor([[[1.0, 0], [-1, 0], [0, 0], [0, 0]]])
    plan = match_plan(x, torch.tensor([1, 2, 3]), torch.tensor([0]), 3)
    assert tofu.mlerp(plan, x).isfinite().all()


def test_half_precision_norms_do_not_overflow():
    x = torch.full((1, 4, 512), 200.0, dtype=torch.float16)                 # the squares are past fp16's largest number
    plan = match_plan(x, torch.tensor([1, 2, 3]), torch.tensor([0]), 3)
    torch.testing.assert_close(tofu.mlerp(plan, x)[0, 0], x[0, 0])


def test_pruning_keeps_the_destination_bit_for_bit():
    x = torch.randn(2, 48, 8)
    plan = plan_of(x, 8, 6, 0.6, torch.Generator().manual_seed(0))
    rows = plan.drop(x)
    for b in range(2):
        for row, members in enumerate(groups(plan, b)):
            assert plan.owner[b, row] in members
            assert torch.equal(rows[b, row], x[b, plan.owner[b, row]])


@pytest.mark.parametrize("separation, pruned", [(0.0, 0), (0.5, 2), (1.0, 3), (0.3, 1)])
def test_separation_depth(separation, pruned):
    assert [tofu.prunes(i, 3, separation) for i in range(3)] == [True] * pruned + [False] * (3 - pruned)
    pipe = FAMILIES["dit"].pipe()
    with tofu.apply(pipe, tofu.Config(separation=separation)) as patch:
        FAMILIES["dit"].run(pipe, steps=2)
        assert patch.counts == {key: 2 * n for key, n in (("pruned", pruned), ("merged", 3 - pruned)) if n}


def test_the_separation_is_not_moved_by_rounding():
    assert sum(tofu.prunes(i, 25, 0.28) for i in range(25)) == 7           # 0.28 * 25 is 7.000000000000001


def test_a_unet_prunes_on_the_way_down():
    blocks = describe(FAMILIES["unet"].pipe().unet).blocks
    finest = [block.index for block in blocks if block.level == 0]
    assert [tofu.prunes(i, len(blocks), 0.5) for i in finest] == [True] * 2 + [False] * 3


def test_with_plain_means_it_is_tome(monkeypatch):
    monkeypatch.setattr(tofu, "mlerp", tofu.Plan.reduce)
    family = FAMILIES["unet"]
    results = []
    for method, config in ((tofu, tofu.Config(separation=0)), (tome, tome.Config())):
        pipe = family.pipe()
        with method.apply(pipe, config):
            results.append(family.run(pipe))
    assert torch.equal(*results)


@pytest.mark.parametrize("wrong, named", [({"ratio": 1.2}, "ratio=1.2"), ({"separation": -1}, "separation=-1"),
                                          ({"stride": 0}, "stride=0"), ({"max_downsample": 3}, "max_downsample=3")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        tofu.Config(**wrong)
