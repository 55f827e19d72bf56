import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from accel_kernels.distance_match import distance_match
from methods import asymrnr
from methods._core.tokens import merge_plan


@pytest.mark.parametrize("check, case", contract.cases(asymrnr, asymrnr.Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


def plan_of(x, dst, share, heads=1):
    free = torch.ones(x.shape[1], dtype=torch.bool).index_fill_(0, dst, False)
    src = free.nonzero()[:, 0]
    distance, into = distance_match(x, src, dst)
    return merge_plan(-distance, into, src, dst, len(src) - asymrnr.kept(x.shape[1], len(dst), share))


def test_worked_by_hand():
    """A 2 x 2 x 2 cell with destination 0: the three farthest of 1..7 stay, 1 to 4 come back as copies of 0."""
    x = torch.arange(8.0)[None, :, None]
    plan = plan_of(x, torch.tensor([0]), 0.5)
    assert plan.owner.tolist() == [[5, 6, 7, 0]]
    assert plan.drop(x).flatten().tolist() == [5, 6, 7, 0]
    assert plan.restore(plan.drop(x)).flatten().tolist() == [0, 0, 0, 0, 0, 5, 6, 7]
    assert plan.reduce(x).flatten().tolist() == [5, 6, 7, 2]                  # mean of 0, 1, 2, 3, 4


def test_distance_not_cosine_decides():
    x = torch.tensor([[[1.0, 0], [2, 0], [0.8, 0.6]]])                        # distances 1 and 0.4, cosines 1 and 0.8
    assert plan_of(x, torch.tensor([0]), 0.3).owner.tolist() == [[1, 0]]


@pytest.mark.parametrize("tokens, dst, share, stay", [(64, 8, 0.5, 24), (17550, 1980, 0.8, 1529), (67320, 8160, 0.9, 0)])
def test_how_many_sources_stay(tokens, dst, share, stay):
    assert asymrnr.kept(tokens, dst, share) == stay


@pytest.mark.parametrize("grid, count", [((4, 4, 4), 8), ((3, 4, 5), 4), ((1, 5, 4), 4), ((13, 30, 45), 1980)])
def test_one_destination_in_each_full_cell(grid, count):
    dst, src = asymrnr.cells(grid, (2, 2, 2), torch.Generator().manual_seed(0))
    assert len(dst) == count and sorted([*dst.tolist(), *src.tolist()]) == list(range(grid[0] * grid[1] * grid[2]))
    place = torch.stack([dst // (grid[1] * grid[2]), dst // grid[2] % grid[1], dst % grid[2]], 1)
    cell = place // torch.tensor([min(2, n) for n in grid])
    assert len(cell.unique(dim=0)) == count                                   # what is left over lies at the far edges
    assert (cell < torch.tensor([n // min(2, n) for n in grid])).all()


def test_ratio_of_the_largest_threshold_below_the_tier():
    thresholds = ((6, 0.4), (7, 0.8))
    assert [asymrnr.ratio(thresholds, tier) for tier in (0, 5, 6, 7, 9)] == [0, 0, 0.4, 0.8, 0.8]


def test_tiers_rise_with_redundancy_and_stay_within_a_window():
    distance = torch.tensor([[1.0, 0.8, 0.0, 0.2], [0.5, 0.5, 0.3, 0.3]])     # means per window of two: .9 .1 / .5 .3
    assert asymrnr.tiers(distance, 2) == [[0, 0, 9, 9], [5, 5, 7, 7]]


def attention(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("mean", [False, True])
def test_one_attention_in_a_loop(mean):
    """CogVideoX: text first, one matching a head; queries matched after norm and rotation, keys by their values."""
    pipe = FAMILIES["cogvideox"].pipe()
    attn, seen = pipe.transformer.transformer_blocks[0].attn1, {}
    config = asymrnr.Config(q=((0, 0.6),), v=((0, 0.4),), mean=mean, seed=5)
    with asymrnr.apply(pipe, config):
        attn.register_forward_hook(lambda _, args, kwargs, out: seen.update(call=(kwargs, out)), with_kwargs=True)
        FAMILIES["cogvideox"].run(pipe, steps=1, size=(64, 64))
    kwargs, (image, text) = seen["call"]
    both = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], 1)
    cos, sin = kwargs["image_rotary_emb"]
    words, n = 5, both.shape[1] - 5
    assert n == 48                                                            # three frames of 4 x 4

    def split(name):
        return getattr(attn, name)(both).unflatten(2, (attn.heads, -1)).transpose(1, 2)

    def turn(x):
        even, odd = x[:, :, words:].unflatten(-1, (-1, 2)).unbind(-1)
        turned = x[:, :, words:] * cos + torch.stack([-odd, even], -1).flatten(-2) * sin
        return torch.cat([x[:, :, :words], turned], 2)

    q, k, v = turn(attn.norm_q(split("to_q"))), turn(attn.norm_k(split("to_k"))), split("to_v")
    out = torch.empty_like(q)
    for b in range(len(q)):
        for h in range(attn.heads):
            chosen = {}
            for number, (x, share) in enumerate(((q, 0.6), (v, 0.4))):
                random = torch.Generator().manual_seed((5 * 1_000_003 * 1009) * 2 + number)
                dst, src = (part.tolist() for part in asymrnr.cells((3, 4, 4), (2, 2, 2), random))
                x = x[b, h, words:]
                near = {i: min((float((x[i] - x[j]).square().sum()), j) for j in dst) for i in src}
                stay = sorted(src, key=lambda i: -near[i][0])[:asymrnr.kept(n, len(dst), share)]
                into = {i: near[i][1] for i in src if i not in stay}
                chosen[number] = stay + dst, into

            def rows(x, number, b=b, h=h, chosen=chosen):
                keep, into = chosen[number]
                x = x[b, h]
                means = {d: torch.stack([x[words + d], *(x[words + i] for i in into if into[i] == d)]).mean(0) for d in keep}
                return torch.cat([x[:words], torch.stack([means[i] if mean else x[words + i] for i in keep])])

            short = attention(rows(q, 0), rows(k, 1), rows(v, 1))
            keep, into = chosen[0]
            out[b, h, :words] = short[:words]
            for i in range(n):
                out[b, h, words + i] = short[words + keep.index(into.get(i, i))]
    expected = attn.to_out[0](out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(text, expected[:, :words], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(image, expected[:, words:], atol=1e-5, rtol=1e-4)


def test_duplicated_tokens_lose_nothing():
    """Every 2 x 2 x 2 cell constant: reducing queries is exact, and so is dropping all sources of the keys."""
    torch.manual_seed(0)
    coarse = torch.randn(1, 2, 1, 2, 1, 2, 1, 8)
    x = coarse.expand(1, 2, 2, 2, 2, 2, 2, 8).reshape(1, 64, 8)
    dst, _ = asymrnr.cells((4, 4, 4), (2, 2, 2), torch.Generator().manual_seed(1))
    queries, values = plan_of(x, dst, 0.6), plan_of(x, dst, 0.875)
    exact = attention(x, x, x)
    torch.testing.assert_close(queries.restore(attention(queries.drop(x), x, x)), exact)
    torch.testing.assert_close(attention(x, values.drop(x), values.drop(x)), exact)


def test_a_matching_lasts_a_window(monkeypatch):
    calls = []
    real = distance_match
    monkeypatch.setattr(asymrnr, "distance_match", lambda *args: calls.append(1) or real(*args))
    family = FAMILIES["latte"]
    pipe = family.pipe()
    with asymrnr.apply(pipe, asymrnr.Config(window=3)):
        family.run(pipe, steps=7)
    assert len(calls) == 2 * 2 * 3                                            # two spatial blocks, q and v, three windows


def test_a_window_of_one_step_reuses_nothing(monkeypatch):
    """Each step draws and matches anew; within a window both stay."""
    family, drawn, matched = FAMILIES["dit"], [], []
    draw, match = asymrnr.cells, distance_match
    monkeypatch.setattr(asymrnr, "cells", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    monkeypatch.setattr(asymrnr, "distance_match", lambda *args: matched.append(args) or match(*args))
    for window, times in ((1, 6), (3, 2), (10, 1)):
        drawn.clear()
        matched.clear()
        pipe = family.pipe()
        with asymrnr.apply(pipe, asymrnr.Config(window=window)):
            family.run(pipe, steps=6)
        assert len(drawn) == len(matched) == 2 * 3 * times                    # q and v of three blocks
        places = {tuple(dst.tolist()) for dst, _ in drawn}
        assert len(places) == len(drawn)


def test_the_halves_of_guidance_share_a_partition_and_match_apart(monkeypatch):
    family, plans = FAMILIES["dit"], []
    real = asymrnr.merge_plan
    monkeypatch.setattr(asymrnr, "merge_plan", lambda *args: plans.append((args, real(*args))) or plans[-1][1])
    pipe = family.pipe()
    with asymrnr.apply(pipe, asymrnr.Config(q=((0, 0.5),), v=())):
        family.run(pipe, steps=1)
    (distance, into, src, dst, _), plan = plans[-1]
    heads = len(distance) // 2
    assert len(src) + len(dst) == 64 and into.shape == (2 * heads, len(src))
    assert all(set(dst.tolist()) <= set(owner.tolist()) for owner in plan.owner)
    assert not torch.equal(into[:heads], into[heads:]) and not torch.equal(plan.owner[:heads], plan.owner[heads:])


def test_a_feature_without_tiers_is_left_whole():
    pipe = FAMILIES["cogvideox"].pipe()
    with asymrnr.apply(pipe, asymrnr.Config(tiers={"q": [[9]] * 3})) as patch:
        FAMILIES["cogvideox"].run(pipe, steps=2)
        assert "values" not in patch.report() and patch.report()["queries"] == 2 * 3


def test_measured_tiers_drive_the_ratios():
    family = FAMILIES["cogvideox"]
    pipe = family.pipe()
    plain = family.run(pipe, steps=4)
    table = asymrnr.measure(pipe, lambda: family.run(pipe, steps=4), asymrnr.Config(window=2))
    assert torch.equal(family.run(pipe, steps=4), plain)                      # measuring leaves nothing behind
    assert table.keys() == {"q", "v"} and all(len(table[name]) == 3 and len(table[name][0]) == 4 for name in table)
    flat = sum(table["q"], [])
    assert min(flat) == 0 and max(flat) == 9
    with asymrnr.apply(pipe, asymrnr.Config(tiers=table, q=((9, 0.5),), v=(), window=2)) as patch:
        family.run(pipe, steps=4)
        assert patch.report()["queries"] == flat.count(9)
    with asymrnr.apply(pipe, asymrnr.Config(tiers=table, q=((9, 0.5),), v=(), window=2)) as patch:
        family.run(pipe, steps=8)                                             # read in proportion
        assert patch.report()["queries"] == 2 * flat.count(9)


def test_below_every_threshold_nothing_changes():
    family = FAMILIES["cogvideox"]
    pipe = family.pipe()
    table = {name: [[3] * 4] * 3 for name in ("q", "v")}
    with asymrnr.apply(pipe, asymrnr.Config(tiers=table)):
        assert torch.equal(family.run(pipe, steps=4), family.run(family.pipe(), steps=4))


def test_tiers_of_another_model_are_refused():
    pipe = FAMILIES["cogvideox"].pipe()
    with pytest.raises(ValueError, match=r"tiers\['q'\] has 2 rows for 3 blocks"):
        asymrnr.apply(pipe, asymrnr.Config(tiers={"q": [[9], [9]]}))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        asymrnr.apply(pipe.transformer, asymrnr.Config(tiers={"q": [[9]] * 3}))


@pytest.mark.parametrize("wrong, named", [({"q": ((6, 1.0),)}, "q="), ({"window": 0}, "window=0"),
                                          ({"stride": (2, 0, 2)}, "stride=")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        asymrnr.Config(**wrong)
