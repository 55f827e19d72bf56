import contract
import pytest
import torch
from families import FAMILIES

from methods import toma


@pytest.mark.parametrize("check, case", contract.cases(toma, toma.Config(ratio=0.5)), ids=contract.name)
def test_contract(check, case):
    check(case)


def matrices(x, places, k, scale=1000.0):
    """The matrices of x (B, N, C) over the regions `places` (P, n)."""
    dst = toma.destinations(x[:, places], k)
    owner = places.expand(len(x), -1, -1).gather(2, dst).flatten(1)
    return toma.Matrices(toma.weights(x[:, places], dst, scale), places, places.flatten().argsort(), owner)


def test_worked_by_hand():
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]])                          # picks 0, which covers 1, then 2
    soft = matrices(x, torch.arange(3)[None], 2, scale=1.0)
    assert soft.owner.tolist() == [[0, 2]]
    e = torch.e / (1 + torch.e)                                             # 0.731
    torch.testing.assert_close(soft.share[0, 0], torch.tensor([[e, e, 1 - e], [1 - e, 1 - e, e]]))
    y = soft.reduce(x)
    torch.testing.assert_close(y, torch.tensor([[[0.84464, 0.15536], [0.42388, 0.57612]]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.restore(y)[0, 0], torch.tensor([0.73148, 0.26852]), atol=1e-5, rtol=0)
    hard = matrices(x, torch.arange(3)[None], 2)
    torch.testing.assert_close(hard.reduce(x), torch.tensor([[[1.0, 0], [0, 1]]]))


@pytest.mark.parametrize("region, shape", [("tile", (12, 8)), ("stripe", (8, 12)), ("global", (2, 48))])
def test_regions_hold_every_position_once(region, shape):
    places = toma.regions(2, 8, 6, region, 4)                               # 4 x 2 tiles: 3 is the next divisor of 6 below 4
    if region == "tile":
        assert places.shape == (2 * 2 * 2, 12) and places[1].tolist()[:4] == [3, 4, 5, 9]
    assert sorted(places.flatten().tolist()) == list(range(96))
    assert (places // 48 == places[:, :1] // 48).all()                      # no region crosses a frame
    if region == "global":
        assert places.shape == shape


def test_merge_and_unmerge_against_a_loop():
    x = torch.randn(2, 32, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places, scale = toma.regions(1, 4, 8, "tile", 4), 3.0
    plan = matrices(x, places, 6, scale)
    y = torch.randn(2, 12, 5, dtype=torch.float64)
    merged, restored = torch.empty(2, 12, 5, dtype=torch.float64), torch.empty_like(x)
    unit = torch.nn.functional.normalize(x, dim=-1)
    for b in range(2):
        for p, region in enumerate(places):
            owners = plan.owner[b, p * 6:(p + 1) * 6]
            logits = torch.tensor([[scale * unit[b, d] @ unit[b, i] for i in region] for d in owners], dtype=torch.float64)
            share = logits.exp() / logits.exp().sum(0)                      # each token's unit mass over the destinations
            for row in range(6):
                merged[b, p * 6 + row] = (share[row] / share[row].sum()) @ x[b, region]
            for column, i in enumerate(region):
                restored[b, i] = share[:, column] @ y[b, p * 6:(p + 1) * 6]
    torch.testing.assert_close(plan.reduce(x), merged, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plan.restore(y), restored, atol=1e-5, rtol=1e-5)


def test_rows_and_columns_add_up_and_a_constant_survives():
    x = torch.randn(2, 64, 8)
    plan = matrices(x, toma.regions(1, 8, 8, "tile", 4), 8, scale=5.0)
    torch.testing.assert_close(plan.share.sum(2), torch.ones(2, 4, 16))
    constant = torch.full_like(x, 1.7)
    torch.testing.assert_close(plan.reduce(constant), torch.full((2, 32, 8), 1.7))
    torch.testing.assert_close(plan.restore(plan.reduce(constant)), constant)


def test_a_hard_choice_is_a_mean_and_a_copy():
    x = torch.randn(1, 16, 8)
    plan = matrices(x, torch.arange(16)[None], 5, scale=1e6)
    similar = torch.nn.functional.cosine_similarity(x[0, plan.owner[0], None], x, dim=-1)
    nearest = similar.argmax(0)
    expected = torch.stack([x[0, nearest == row].mean(0) for row in range(5)])
    torch.testing.assert_close(plan.reduce(x)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plan.restore(plan.reduce(x))[0], expected[nearest], atol=1e-5, rtol=1e-5)
    assert torch.equal(nearest[plan.owner[0]], torch.arange(5))             # a destination stays where it is


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("region", ["tile", "stripe", "global"])
def test_keeping_every_token_only_reorders_them(name, region):
    """No token is merged away: a permutation goes through the attention, with its rotary positions, and back."""
    family = FAMILIES[name]
    plain, pipe = family.run(family.pipe()), family.pipe()
    with toma.apply(pipe, toma.Config(ratio=1e-9, region=region, scale=1e7)) as patch:
        out = family.run(pipe)
        assert patch.report()["state"] == "engaged"
    torch.testing.assert_close(out, plain, atol=2e-3, rtol=2e-3)


def test_the_blocks_of_a_kind_share_the_choice_of_the_first(monkeypatch):
    calls = []
    choose = toma.destinations
    monkeypatch.setattr(toma, "destinations", lambda x, k: calls.append(x.shape) or choose(x, k))
    pipe = FAMILIES["flux"].pipe(layers=4)
    with toma.apply(pipe, toma.Config(skip=1, every=3, select_every=6, weigh_every=3)) as patch:
        FAMILIES["flux"].run(pipe, steps=7)                                 # merges at steps 0, 3, 6; chooses at 0 and 6
        assert len(calls) == 2 * 2                                          # once for joint, once for single blocks
        assert patch.report()["merged"] == 3 * (3 + 3)


def test_samples_choose_apart_where_positions_stay_outside_the_attention():
    x = torch.randn(2, 16, 8)
    places = torch.arange(16)[None]
    both = matrices(x, places, 8)
    for b in range(2):
        alone = matrices(x[b:b + 1], places, 8)
        assert torch.equal(alone.owner[0], both.owner[b])


@pytest.mark.parametrize("wrong, named", [({"ratio": 1.0}, "ratio=1.0"), ({"region": "row"}, "region='row'"),
                                          ({"side": 0}, "side=0"), ({"weigh_every": 2, "select_every": 3}, "must divide"),
                                          ({"skip": -1}, "skip=-1"), ({"scale": 0.0}, "scale=0.0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        toma.Config(**wrong)


def test_skipping_everything_is_refused():
    with pytest.raises(ValueError, match="after the first 5 blocks of a kind"):
        toma.apply(FAMILIES["dit"].pipe(), toma.Config(skip=5))
