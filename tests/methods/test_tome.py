import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from methods import tome
from methods._core import tokens
from methods._core.tokens import match_plan


@pytest.mark.parametrize("check, case", contract.cases(tome, tome.Config(ratio=0.5)), ids=contract.name)
def test_contract(check, case):
    check(case)


def plan_of(x, height, width, ratio, stride=2, random=None):
    dst = tokens.destinations(1, height, width, stride, random)
    free = torch.ones(height * width, dtype=torch.bool).index_fill_(0, dst, False)
    return match_plan(x, free.nonzero()[:, 0], dst, tokens.reduction(height * width, len(dst), ratio))


def test_worked_by_hand():
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [1, 1]]])                 # 2 x 2 grid, destination t0
    plan = plan_of(x, 2, 2, 0.5)                                           # cosines to t0: 1, 0, 0.707
    torch.testing.assert_close(plan.reduce(x), torch.tensor([[[0.0, 1], [1, 1 / 3]]]))
    merged = torch.tensor([1, 1 / 3])
    expected = torch.stack([merged, merged, torch.tensor([0.0, 1]), merged])[None]
    torch.testing.assert_close(plan.restore(plan.reduce(x)), expected)


@pytest.mark.parametrize("ratio, rows", [(0.5, 2048), (0.9, 1024), (0.0, 4096)])
def test_merged_length(ratio, rows):
    dst = tokens.destinations(1, 64, 64, 2, None)
    assert 4096 - tokens.reduction(4096, len(dst), ratio) == rows


def test_odd_grid_leaves_the_border_to_the_sources():
    assert len(tokens.destinations(1, 5, 5, 2, None)) == 4
    with pytest.raises(ValueError, match="stride=6 is more than the grid of 5 x 9 tokens"):
        tokens.destinations(1, 5, 9, 6, None)


def test_one_random_destination_in_each_cell_of_each_frame():
    dst = tokens.destinations(2, 6, 4, 2, torch.Generator().manual_seed(3))
    frame, place = dst // 24, dst % 24
    assert (frame * 6 + (place // 4 // 2) * 2 + place % 4 // 2).tolist() == list(range(12))
    others = tokens.destinations(2, 6, 4, 2, torch.Generator().manual_seed(4))
    assert not torch.equal(dst, others)


def test_merging_is_an_average_and_restoring_it_a_projection():
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    plan = plan_of(x, 6, 5, 0.6, random=torch.Generator().manual_seed(0))
    ones = torch.ones(2, 30, 1, dtype=torch.float64)
    assert torch.equal(plan.reduce(ones), torch.ones_like(plan.reduce(ones)))            # weights of a row add up to one
    y = torch.randn_like(x)
    torch.testing.assert_close(plan.reduce(x + 3 * y), plan.reduce(x) + 3 * plan.reduce(y))
    once = plan.restore(plan.reduce(x))
    torch.testing.assert_close(plan.restore(plan.reduce(once)), once)
    constant = torch.full_like(x, 1.7)
    torch.testing.assert_close(plan.restore(plan.reduce(constant)), constant)


def test_every_position_belongs_to_exactly_one_row_and_each_row_to_its_owner():
    x = torch.randn(3, 48, 8)
    plan = plan_of(x, 8, 6, 0.5, random=torch.Generator().manual_seed(0))
    assert plan.segments.source.shape == (3, 48)
    assert all(sorted(rows.unique().tolist()) == list(range(24)) for rows in plan.segments.source)
    assert torch.equal(plan.segments.source.gather(1, plan.owner), torch.arange(24).expand(3, -1))


def test_attention_cost_at_half_the_tokens():
    def cost(n, c=320):
        return 4 * n * c * c + 2 * n * n * c
    assert cost(2048) / cost(4096) == pytest.approx(0.284, abs=5e-4)


def test_a_share_of_destinations_between_samples_and_branches():
    """Sequential and batched guidance merge alike: the draw depends on the step, not on the call."""
    pipe = FAMILIES["unet"].pipe()
    x, text = torch.randn(1, 4, 16, 16), torch.randn(2, 5, 16)
    with tome.apply(pipe.unet):
        both = pipe.unet(torch.cat([x, x]), 10, text).sample
    with tome.apply(pipe.unet) as patch:
        apart = []
        for words in text:
            patch.reset()
            apart.append(pipe.unet(x, 10, words[None]).sample)
    torch.testing.assert_close(both, torch.cat(apart), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong, named", [({"ratio": 1.2}, "ratio=1.2"), ({"stride": 0}, "stride=0"),
                                          ({"max_downsample": 3}, "max_downsample=3")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        tome.Config(**wrong)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_equals_tomesd(ratio, random, monkeypatch):
    """The whole UNet against the official package, which is handed our draws of the destinations."""
    tomesd = pytest.importorskip("tomesd")
    unet = FAMILIES["unet"].pipe().unet
    x, text = torch.randn(2, 4, 16, 24), torch.randn(2, 5, 16)
    draw, drawn = torch.randint, []
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn.append(draw(*args, **kwargs)) or drawn[-1])
    with tome.apply(unet, tome.Config(ratio=ratio, random=random, max_downsample=2)):
        ours = unet(x, 10, text).sample
    monkeypatch.setattr(torch, "randint", lambda *_, size, **__: drawn.pop(0).view(size))
    tomesd.apply_patch(unet, ratio=ratio, use_rand=random, max_downsample=2)
    theirs = unet(x, 10, text).sample
    assert not drawn
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
