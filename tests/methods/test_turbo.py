from functools import partial

import pytest
import torch
from contracts import patch as contract
from diffusers.models.attention_processor import Attention
from families import FAMILIES, FIRST, Family

from accel_kernels.cosine_match import cosine_match
from methods import tome, turbo
from methods._core.attention import at_product
from methods._core.cache import Slot
from methods._core.denoiser import describe
from methods._core.tokens import merge_plan


@pytest.mark.parametrize("check, case", contract.cases(turbo, turbo.Config(ratio=0.5)), ids=contract.name)
def test_contract(check, case):
    check(case)


def halves(tokens):
    """The split of the released code: even positions are sources, the class token first; odd ones are destinations."""
    return torch.arange(0, tokens, 2), torch.arange(1, tokens, 2)


def merged(x, value, r, weight=150.0, fusion="difference"):
    src, dst = halves(x.shape[1])
    score, into = cosine_match(x, src, dst)
    score = turbo.edge_score(score, value[:, src], weight, fusion)
    score[:, 0] = -torch.inf
    return merge_plan(score, into, src, dst, r)


@pytest.mark.parametrize("layer, beta, gamma", [(0, 1.0, 0), (2, 0.5, 0), (1, 0.5, 3)])
def test_what_merges_is_redundant_and_means_little(layer, beta, gamma):
    x, value = torch.randn(2, 41, 8), torch.rand(2, 41) / 41
    plan = merged(x, value, 9, turbo.weight(layer, 2.0, beta, gamma))
    unit = x / x.norm(dim=-1, keepdim=True)
    for b in range(2):
        edges = {}
        for i in range(2, 41, 2):
            score, into = max((float(unit[b, i] @ unit[b, j]), j) for j in range(1, 41, 2))
            edges[i] = score - 60 * beta ** abs(gamma - layer) * float(value[b, i]), into
        moved = sorted(edges, key=edges.get, reverse=True)[:9]
        alone = [i for i in range(0, 41, 2) if i not in moved]
        assert plan.owner[b].tolist() == alone + list(range(1, 41, 2))     # the class token stays, and stays first
        for i in moved:
            assert plan.segments.source[b, i] == plan.segments.source[b, edges[i][1]]


def test_no_weight_is_token_merging_and_a_constant_value_too():
    x = torch.randn(2, 40, 8)
    plain = merged(x, torch.zeros(2, 40), 9).segments.source
    assert torch.equal(merged(x, torch.rand(2, 40), 9, weight=0.0).segments.source, plain)
    assert torch.equal(merged(x, torch.full((2, 40), 0.01), 9).segments.source, plain)
    family = FAMILIES["unet"]
    results = []
    for method, config in ((turbo, turbo.Config(alpha=0.0)), (tome, tome.Config())):
        pipe = family.pipe()
        with method.apply(pipe, config):
            results.append(family.run(pipe))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)             # another attention kernel, the same tokens


@pytest.mark.parametrize("fusion", ["difference", "ratio"])
def test_a_token_of_great_value_is_never_merged(fusion):
    x, value = torch.rand(1, 40, 8), torch.full((1, 40), 1 / 40)
    value[0, 6] = 1e6
    assert 6 in merged(x, value, 18, fusion=fusion).owner[0]


def test_ratio_form():
    score = turbo.edge_score(torch.tensor([[0.9, 0.9, 0.1]]), torch.tensor([[0.5, 0.25, 0.0]]), 150.0, "ratio")
    assert score[0, :2].tolist() == pytest.approx([1.8, 3.6]) and score.isfinite().all()


def test_semantic_value_is_the_column_mean_of_the_attention_map():
    """A layer that merges nothing, against the map written out; then its copy to the positions of merged tokens."""
    pipe = FAMILIES["unet"].pipe()
    block = describe(pipe.unet).blocks[0]
    attn: Attention = block.attn
    x = torch.randn(2, 16, 32)
    layer = turbo._Layer(block, Slot(), 150.0, "difference")
    layer.tokens, layer.src, layer.dst, layer.r = 16, torch.arange(1, 16), torch.zeros(1, dtype=torch.long), 0
    layer.input = x
    merged = at_product(layer.attend)
    torch.testing.assert_close(layer.around(partial(merged, attn.forward), x), attn(x), atol=1e-5, rtol=1e-5)
    q, k = (torch.stack(p(x).chunk(attn.heads, -1), 1) for p in (attn.to_q, attn.to_k))
    maps = (q @ k.mT * attn.scale).softmax(-1)
    torch.testing.assert_close(layer.value.value, maps.mean((1, 2)), atol=1e-6, rtol=1e-5)
    layer.r, layer.input = 15, x
    layer.around(partial(merged, attn.forward), x)
    torch.testing.assert_close(layer.value.value, torch.ones(2, 16))       # one token left: it receives all there is


def layers_of(pipe):
    model = Family.model(pipe)
    blocks = [block for block in describe(model).blocks if hasattr(block.attn, "_patch_site")]
    return [block.attn._patch_site.arounds[0][2].__self__ for block in blocks]


def test_the_weight_falls_with_the_distance_from_gamma_among_layers_that_merge():
    pipe = FAMILIES["unet"].pipe()
    with turbo.apply(pipe, turbo.Config(alpha=2.0, beta=0.5, gamma=1)):
        found = layers_of(pipe)
        assert [layer.block.index for layer in found] == [0, 1, 8, 9, 10]              # of 11 blocks, five at full size
        assert [float(layer.weight) for layer in found] == [30.0, 60.0, 30.0, 15.0, 7.5]


def test_the_fusion_chosen_ranks_the_tokens():
    pipe = FAMILIES["dit"].pipe()
    with turbo.apply(pipe, turbo.Config(fusion="ratio")):
        layer = layers_of(pipe)[1]
        FAMILIES["dit"].run(pipe, steps=2)
        x, value = torch.randn(2, 64, 32), layer.value.value
        score, into = cosine_match(x, layer.src, layer.dst)
        expected = merge_plan(score / value[:, layer.src], into, layer.src, layer.dst, 32)
        assert torch.equal(layer.match(x).segments.source, expected.segments.source)


def test_samples_that_share_a_plan_share_their_mean_value():
    pipe = FAMILIES["flux"].pipe()
    with turbo.apply(pipe):
        for layer in layers_of(pipe):
            src, dst = layer.src, layer.dst = halves(40)
            x, layer.value.value, layer.r = torch.randn(2, 40, 32), torch.rand(2, 40) / 40, 9
            score, into = cosine_match(torch.cat([x[0], x[1]], -1)[None], src, dst)    # one token of twice the channels
            score = score - 150 * (layer.value.value[:1, src] + layer.value.value[1:, src]) / 2
            expected = merge_plan(score, into, src, dst, 9, 2).segments.source
            assert torch.equal(layer.match(x).segments.source, expected)


@pytest.mark.parametrize("name", FIRST)
def test_merging_nothing_changes_nothing(name):
    """Every attention is computed here, with all of its tokens."""
    family = FAMILIES[name]
    plain, pipe = family.run(family.pipe()), family.pipe()
    with turbo.apply(pipe, turbo.Config(ratio=1e-9, max_downsample=2)):
        torch.testing.assert_close(family.run(pipe), plain, atol=2e-3, rtol=2e-3)


def test_the_first_step_of_each_branch_ranks_by_similarity():
    pipe = FAMILIES["dit"].pipe()
    with turbo.apply(pipe) as patch:
        FAMILIES["dit"].run(pipe, steps=4)
        assert patch.counts == {"by_similarity": 3, "by_information": 9}
        assert patch.report()["cached_bytes"] == 3 * 2 * 64 * 4


@pytest.mark.parametrize("wrong, named", [
    ({"ratio": 1.2}, "ratio=1.2"), ({"alpha": -1}, "alpha=-1"), ({"beta": -1}, "beta=-1"), ({"fusion": "sum"}, "fusion='sum'"),
    ({"stride": 0}, "stride=0"), ({"max_downsample": 3}, "max_downsample=3")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        turbo.Config(**wrong)
