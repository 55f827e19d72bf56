import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from accel_kernels.cosine_match import cosine_match
from methods import itome
from methods._core.denoiser import describe
from methods._core.tokens import Plan, match_plan, merge_plan


@pytest.mark.parametrize("check, case", contract.cases(itome, itome.Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


def test_importance_is_the_guidance_difference_of_the_noise_channels():
    out = torch.randn(4, 8, 6, 10)                                         # two images; 4 channels of noise, 4 of variance
    expected = torch.empty(2, 3, 5)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                cell = (slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
                expected[b, y, x] = (out[b, :4, *cell] - out[b + 2, :4, *cell]).abs().mean()
    torch.testing.assert_close(itome.importance(out[:2], out[2:], 4, 3, 5), expected.flatten(1))
    video = torch.randn(2, 4, 3, 6, 10)
    frames = torch.cat([itome.importance(*video[:, :, f].chunk(2), 4, 6, 10) for f in range(3)])
    assert torch.equal(itome.importance(*video.chunk(2), 4, 6, 10), frames)


@pytest.mark.parametrize("tokens, ratio, pool, expected", [
    (9216, 0.7, 1.4, (6451, 2304, 3870)), (4096, 0.5, 1.0, (2048, 1024, 2048)), (9216, 0.5, 4.0, (4608, 2304, 9216))])
def test_sizes(tokens, ratio, pool, expected):
    assert itome.sizes(tokens, ratio, 0.25, pool) == expected


def test_a_ratio_that_leaves_too_few_sources_is_refused():
    assert itome.sizes(9216, 0.75, 0.25, 1.4) == (6912, 2304, 3225)
    with pytest.raises(ValueError, match="at most 1 - destinations = 0.75"):
        itome.sizes(9216, 0.76, 0.25, 1.4)
    pipe = FAMILIES["unet"].pipe()
    with pytest.raises(ValueError, match="ratio=0.76"):
        itome.apply(pipe, itome.Config(ratio=0.76))
    assert "_patch_site" not in vars(pipe.unet)
    with itome.apply(pipe, itome.Config(ratio=0.75)):
        FAMILIES["unet"].run(pipe, size=(32, 48))


def drawn(importance, ratio=0.7, pool=1.4):
    N = importance.shape[1]
    r, D, M = itome.sizes(N, ratio, 0.25, pool)
    return (r, D, M, *itome.draw(importance, D, M, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("ratio, pool", [(0.7, 1.4), (0.5, 1.0), (0.6, 1.2)])
def test_what_is_drawn_and_what_must_merge(ratio, pool):
    score, x = torch.rand(3, 96), torch.randn(3, 96, 8)
    r, D, M, dst, src, below = drawn(score, ratio, pool)
    assert all(torch.cat([a, b]).sort().values.tolist() == list(range(96)) for a, b in zip(src, dst, strict=True))
    value, into = cosine_match(x, src, dst)
    plan = merge_plan(value + below * itome.FORCE, into, src, dst, r)
    assert plan.segments.length == 96 - r
    for b in range(3):
        top = set(score[b].sort(descending=True).indices[:M].tolist())
        assert set(dst[b].tolist()) <= top and dst[b].unique().numel() == D
        alone = set(plan.owner[b, :96 - r - D].tolist())
        assert alone <= top                                                # every token below the pool is merged
        best = {i: float(torch.cosine_similarity(x[b, i], x[b, dst[b]], dim=-1).max()) for i in top - set(dst[b].tolist())}
        wanted = sorted(best, key=best.get)[:len(alone)]                   # the least alike of the pool stay alone
        assert alone == set(wanted)
        if pool == 1.0:
            assert len(alone) == M - D


def test_only_the_order_of_the_importance_counts():
    score = torch.rand(2, 96)
    for a, b in zip(drawn(score)[3:], drawn(score * 7)[3:], strict=True):
        assert torch.equal(a, b)


def test_constant_importance_forces_nothing():
    assert not drawn(torch.ones(1, 96))[5].any()


def test_a_constant_importance_over_the_whole_is_tome_with_random_destinations():
    x = torch.randn(1, 96, 8)
    r, D, M, dst, src, below = drawn(torch.ones(1, 96), 0.5, 2.0)
    assert M == 96 and dst[0].tolist() == torch.randperm(96, generator=torch.Generator().manual_seed(0))[:D].tolist()
    value, into = cosine_match(x, src, dst)
    plan = merge_plan(value + below * itome.FORCE, into, src, dst, r)
    assert torch.equal(plan.segments.source, match_plan(x, src[0], dst[0], r).segments.source)


def test_nearest_place():
    src, dst = torch.tensor([[0, 5, 23]]), torch.tensor([[3, 20]])         # 4 x 6 grid: (0,0) (0,5) (3,5); (0,3) (3,2)
    score, into = itome.nearest_place(src, dst, 6)
    assert into.tolist() == [[0, 0, 1]]
    torch.testing.assert_close(score, -torch.tensor([[3.0, 2, 3]]))


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_schedule(name):
    family, seen = FAMILIES[name], []
    pipe = family.pipe()
    with itome.apply(pipe, itome.Config(importance_from=1, merge_from=3)) as patch:
        layer = first_layer(pipe)

        def look(module, args, kwargs):
            plan = layer.ready or layer.match
            seen.append((len(plan[1]), layer.reducer.__name__))
        handle = layer.block.attn.register_forward_pre_hook(look, with_kwargs=True)
        family.run(pipe, steps=4)
        handle.remove()
        assert patch.report()["pruned"] == 3 * patch.report()["merged"] > 0
    assert [rows for rows, _ in seen] == [1, 2, 2, 2]                      # a grid for all, then a draw for each half
    assert [reducer for _, reducer in seen] == ["drop"] * 3 + ["reduce"]


def first_layer(pipe):
    """The state of the first block that merges, found through what stands around its attention."""
    model = Family.model(pipe)
    block = next(block for block in describe(model).blocks if hasattr(block.attn, "_patch_site"))
    return block.attn._patch_site.arounds[0][2].__self__


@pytest.mark.parametrize("name, kept, pool, importance_from, merge_from", [
    ("unet", 256 - 179, 107, 2, 2), ("pixart", 32, 32, 1, 4)])
def test_the_defaults_of_the_demos(monkeypatch, name, kept, pool, importance_from, merge_from):
    now, used, merged, lengths, draw = [], [], [], set(), itome.draw
    pipe = FAMILIES[name].pipe()
    monkeypatch.setattr(itome, "draw", lambda *args: used.append((len(now), args[2])) or draw(*args))
    with itome.apply(pipe):
        layer = first_layer(pipe)

        def look(module, args):
            lengths.add(args[0].shape[1])
            merged.append(layer.reducer is Plan.reduce)
            now.append(None)
        layer.block.attn.to_q.register_forward_pre_hook(look)
        FAMILIES[name].run(pipe, steps=6)
    assert used == [(i, pool) for i in range(importance_from, 6)]
    assert merged == [False] * merge_from + [True] * (6 - merge_from)
    assert lengths == {kept}


def test_which_blocks_merge():
    pipe = FAMILIES["pixart"].pipe(layers=28)
    with itome.apply(pipe):
        blocks = describe(pipe.transformer).blocks
        assert [block.index for block in blocks if hasattr(block.attn, "_patch_site")] == list(range(7, 21))
    pipe = FAMILIES["unet"].pipe()
    for limit, levels in ((1, {0}), (2, {0, 1})):
        with itome.apply(pipe, itome.Config(max_downsample=limit)):
            assert {block.level for block in describe(pipe.unet).blocks if hasattr(block.attn, "_patch_site")} == levels


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_every_token_less_important_than_the_pool_is_merged(monkeypatch, name):
    draws, plans, draw = [], [], itome.draw
    pipe = FAMILIES[name].pipe()
    monkeypatch.setattr(itome, "draw", lambda *args: draws.append(args[:3]) or draw(*args))
    with itome.apply(pipe, itome.Config(importance_from=1)):
        layer = first_layer(pipe)
        make = layer.planner
        layer.planner = lambda x: plans.append(make(x)) or plans[-1]
        FAMILIES[name].run(pipe, steps=4, batch=2)
    for (score, D, M), plan in zip(draws, plans[1:], strict=True):
        threshold = score.sort(1, descending=True).values[:, M - 1].repeat(2)
        assert plan.owner.shape[0] == 4 and plan.segments.length > D
        for b in range(4):
            assert (score[b % 2, plan.owner[b]] >= threshold[b]).all()


def test_an_early_step_reads_tokens_as_they_are():
    pipe, whole, rows, plans = FAMILIES["unet"].pipe(), [], [], []
    with itome.apply(pipe, itome.Config(importance_from=1, merge_from=9)):
        layer = first_layer(pipe)
        make = layer.planner
        layer.planner = lambda x: plans.append(make(x)) or plans[-1]
        layer.block.attn.register_forward_pre_hook(lambda _, args: whole.append(args[0]))
        layer.block.attn.to_q.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
        FAMILIES["unet"].run(pipe, steps=3)
    assert len(plans) == 3
    for x, short, plan in zip(whole, rows, plans, strict=True):
        for b in range(2):
            assert torch.equal(short[b], x[b, plan.owner[b]])


def test_the_output_kept_for_importance_is_counted():
    pipe = FAMILIES["unet"].pipe()
    with itome.apply(pipe) as patch:
        FAMILIES["unet"].run(pipe, steps=2)
        assert patch.report()["cached_bytes"] == 2 * 4 * 16 * 16 * 4


@pytest.mark.parametrize("batch", [1, 2])
def test_when_guidance_ends_destinations_come_from_a_grid(batch):
    pipe, rows = FAMILIES["unet"].pipe(), []

    def end(pipe, i, t, inputs):
        if i == 2:
            pipe._guidance_scale = 0.0
            inputs["prompt_embeds"] = inputs["prompt_embeds"].chunk(2)[1]
        return inputs
    with itome.apply(pipe, itome.Config(importance_from=1)):
        layer = first_layer(pipe)
        layer.block.attn.register_forward_pre_hook(lambda _, args: rows.append((len(args[0]), len(layer.match[1]))))
        out = FAMILIES["unet"].run(pipe, steps=6, batch=batch, callback_on_step_end=end,
                                   callback_on_step_end_tensor_inputs=["prompt_embeds"])
    both = 2 * batch
    assert rows == [(both, 1), (both, both), (both, both)] + [(batch, 1)] * 3
    assert out.isfinite().all()


def test_both_guidance_halves_share_their_destinations():
    pipe = FAMILIES["unet"].pipe()
    with itome.apply(pipe):
        layer = first_layer(pipe)
        FAMILIES["unet"].run(pipe, steps=3, batch=2)
        src, dst, forced, _ = layer.match
    assert len(dst) == 4 and not torch.equal(dst[0], dst[1])
    for half in (src, dst, forced):
        assert torch.equal(half[:2], half[2:])


def test_both_guidance_halves_share_a_matching_by_place():
    pipe = FAMILIES["pixart"].pipe()
    with itome.apply(pipe):
        layer = first_layer(pipe)
        FAMILIES["pixart"].run(pipe, steps=6, batch=2)
        source = layer.ready.segments.source
    assert torch.equal(source[:2], source[2:]) and not torch.equal(source[0], source[1])


def test_without_guidance_destinations_stay_on_the_grid():
    pipe = FAMILIES["unet"].pipe()
    with itome.apply(pipe):
        layer = first_layer(pipe)
        FAMILIES["unet"].run(pipe, steps=4, guidance=1.0)
        cells = layer.match[1] // 16 // 2 * 8 + layer.match[1] % 16 // 2
        assert sorted(cells.flatten().tolist()) == list(range(64))


def test_cross_attention_is_merged_on_a_transformer():
    pipe = FAMILIES["pixart"].pipe()
    lengths = []
    with itome.apply(pipe):
        block = pipe.transformer.transformer_blocks[1]
        handle = block.attn2.to_q.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        FAMILIES["pixart"].run(pipe, steps=2)
        handle.remove()
    assert lengths == [32, 32]


@pytest.mark.parametrize("wrong, named", [
    ({"ratio": 1.2}, "ratio=1.2"), ({"pool": 0.9}, "pool=0.9"), ({"destinations": 0}, "destinations=0"),
    ({"importance_from": 0}, "importance_from=0"), ({"depth": (0.5, 0.5)}, "depth="),
    ({"max_downsample": 3}, "max_downsample=3")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        itome.Config(**wrong)
