import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, FIRST

from methods import fora, toma
from methods._core.denoiser import describe


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


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("region", ["tile", "stripe", "global"])
def test_keeping_every_token_only_reorders_them(name, region):
    """No token is merged away: a permutation goes through the attention, with its rotary positions, and back."""
    family = FAMILIES[name]
    plain, pipe = family.run(family.pipe()), family.pipe()
    with toma.apply(pipe, toma.Config(ratio=1e-9, region=region, scale=1e7, max_downsample=2)) as patch:
        out = family.run(pipe)
        assert patch.report()["state"] == "no gain"
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


def computed(monkeypatch, pipe, config, steps, others=()):
    """The steps of a run at which destinations were chosen, and those at which matrices were computed."""
    now, selected, weighed = [], [], []
    choose, weigh = toma.destinations, toma.weights
    monkeypatch.setattr(toma, "destinations", lambda x, k: selected.append(len(now) - 1) or choose(x, k))
    monkeypatch.setattr(toma, "weights", lambda *args: weighed.append(len(now) - 1) or weigh(*args))
    pipe.transformer.register_forward_pre_hook(lambda *_: now.append(None))
    patches = [method.apply(pipe, each) for method, each in ((toma, config), *others)]
    FAMILIES["dit"].run(pipe, steps=steps)
    for patch in patches:
        patch.remove()
    return selected, weighed


def test_choices_and_matrices_are_due_by_the_step_of_the_last(monkeypatch):
    config = toma.Config(every=3, select_every=10, weigh_every=5)
    selected, weighed = computed(monkeypatch, FAMILIES["dit"].pipe(layers=2), config, 35)
    assert selected == [0, 12, 24] and weighed == [0, 6, 12, 18, 24, 30]


def test_what_a_cache_skips_stays_due(monkeypatch):
    cache = fora, fora.Config(interval=3, count_from="start")                          # runs the blocks at 0, 3, 6, ...
    config = toma.Config(select_every=4, weigh_every=2)
    selected, weighed = computed(monkeypatch, FAMILIES["dit"].pipe(layers=2), config, 14, [cache])
    assert selected == [0, 6, 12] and weighed == [0, 3, 6, 9, 12]


def test_the_blocks_of_a_kind_are_those_of_a_stage_of_a_unet(monkeypatch):
    shapes, choose = [], toma.destinations
    monkeypatch.setattr(toma, "destinations", lambda x, k: shapes.append((*x.shape[1:3], k)) or choose(x, k))
    pipe = FAMILIES["unet"].pipe()
    with toma.apply(pipe, toma.Config(ratio=0.25, max_downsample=2)):
        FAMILIES["unet"].run(pipe, steps=1)
    assert shapes == [(16, 16, 12), (4, 16, 12), (4, 16, 12), (16, 16, 12)]            # down 0 and 1, up 1 and 0


@pytest.mark.parametrize("name", ["dit", "pixart"])
@pytest.mark.parametrize("ratio, region, kept", [
    (0.25, "tile", 48), (0.75, "tile", 16), (0.3, "tile", 44), (0.3, "global", 45)])
def test_how_many_tokens_the_attention_reads(name, ratio, region, kept):
    pipe, lengths = FAMILIES[name].pipe(), []
    with toma.apply(pipe, toma.Config(ratio=ratio, region=region)):
        for block in describe(pipe.transformer).blocks:
            block.attn.to_q.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        FAMILIES[name].run(pipe, steps=1)
    assert lengths == [kept] * 3


def test_the_matrix_is_an_attention():
    x, scale = torch.randn(2, 1, 16, 8), 5.0
    dst = toma.destinations(x, 6)
    unit = torch.nn.functional.normalize(x, dim=-1)
    chosen = unit.gather(2, dst[..., None].expand(-1, -1, -1, 8))
    transposed = torch.nn.functional.scaled_dot_product_attention(unit, chosen, torch.eye(6).expand(2, 1, 6, 6), scale=scale)
    torch.testing.assert_close(toma.weights(x, dst, scale), transposed.mT)


def test_matrices_stay_in_single_precision_under_autocast():
    x = torch.randn(1, 2, 16, 8)
    dst = toma.destinations(x, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = toma.weights(x, dst, 1000.0)
    assert found.dtype == torch.float32 and torch.equal(found, toma.weights(x, dst, 1000.0))


@pytest.mark.parametrize("height, width, region", [(31, 31, "tile"), (31, 31, "stripe"), (7, 5, "tile"), (1, 1, "global")])
def test_a_region_of_one_token_is_refused(height, width, region):
    with pytest.raises(ValueError, match=f"one token of a {height} x {width} grid"):
        toma.regions(1, height, width, region, 4)


def test_samples_choose_apart_where_positions_stay_outside_the_attention():
    x = torch.randn(2, 16, 8)
    places = torch.arange(16)[None]
    both = matrices(x, places, 8)
    for b in range(2):
        alone = matrices(x[b:b + 1], places, 8)
        assert torch.equal(alone.owner[0], both.owner[b])


@pytest.mark.parametrize("wrong, named", [({"ratio": 1.0}, "ratio=1.0"), ({"region": "row"}, "region='row'"),
                                          ({"side": 0}, "side=0"), ({"weigh_every": 2, "select_every": 3}, "must divide"),
                                          ({"skip": -1}, "skip=-1"), ({"scale": 0.0}, "scale=0.0"),
                                          ({"max_downsample": 3}, "max_downsample=3")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        toma.Config(**wrong)


def test_skipping_everything_is_refused():
    with pytest.raises(ValueError, match="after the first 5 blocks of a kind"):
        toma.apply(FAMILIES["dit"].pipe(), toma.Config(skip=5))
