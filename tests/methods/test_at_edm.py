import pytest
import torch
from contracts import patch as contract
from diffusers import UNet2DConditionModel
from families import FAMILIES, Family

from accel_tools.measure.macs import count_macs
from methods import at_edm
from methods._core.denoiser import describe


@pytest.mark.parametrize("check, case", contract.cases(at_edm, at_edm.Config(ratio=0.5)), ids=contract.name)
def test_contract(check, case):
    check(case)


def graph(q, k):
    """The map (B, H, N, N) in full."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def queries_for(a):
    """q, k of one head whose map is the given row-stochastic A (N, N), scale included."""
    n = len(a)
    return (a.log() * n ** 0.5)[None, None], torch.eye(n)[None, None]


def test_worked_by_hand():
    a = torch.tensor([[0.5, 0.5], [0.25, 0.75]])                       # stationary: (1/3, 2/3)
    q, k = queries_for(a)
    torch.testing.assert_close(graph(q, k)[0, 0], a)
    lse = at_edm.log_sums(q, k)
    torch.testing.assert_close(at_edm.page_rank(q, k, lse, 1), torch.tensor([[0.375, 0.625]]))
    torch.testing.assert_close(at_edm.page_rank(q, k, lse, 30), torch.tensor([[1 / 3, 2 / 3]]))
    plan = at_edm.prune(q, k, kept=1, rounds=4)
    x = torch.tensor([[[1.0], [2.0]]])
    assert plan.owner.tolist() == [[1]]
    assert plan.restore(plan.drop(x)).flatten().tolist() == [2.0, 2.0]


def test_rank_prune_and_copy_in_a_loop():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    x = torch.randn(2, 20, 5)
    plan = at_edm.prune(q, k, kept=7, rounds=3)
    for b in range(2):
        score = torch.zeros(20)
        for h in range(3):
            a, s = graph(q, k)[b, h], torch.full((20,), 1 / 20)
            for _ in range(3):
                s = a.T @ s
            assert s.sum() == pytest.approx(1, abs=1e-5) and (s >= 0).all()
            score += s ** 2 / 3
        keep = sorted(score.sqrt().argsort(descending=True)[:7].tolist())
        assert plan.owner[b].tolist() == keep
        mean = graph(q, k)[b].mean(0)
        expected = torch.stack([x[b, i] if i in keep else x[b, keep[int(mean[i, keep].argmax())]] for i in range(20)])
        assert torch.equal(plan.restore(plan.drop(x))[b], expected)


def test_the_rank_of_one_head_is_a_distribution():
    q, k = torch.randn(2, 1, 20, 8), torch.randn(2, 1, 20, 8)
    for rounds in (1, 4):
        rank = at_edm.page_rank(q, k, at_edm.log_sums(q, k), rounds)
        assert (rank > 0).all()
        torch.testing.assert_close(rank.sum(1), torch.ones(2))


def test_a_doubly_stochastic_map_ranks_all_alike():
    a = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.2, 0.3], [0.3, 0.5, 0.2]])
    q, k = queries_for(a)
    torch.testing.assert_close(at_edm.page_rank(q, k, at_edm.log_sums(q, k), 5), torch.full((1, 3), 1 / 3))
    assert at_edm.prune(q, k, kept=2, rounds=5).owner.shape == (1, 2)


def test_a_shared_ranking_keeps_the_same_tokens_in_both_branches():
    torch.manual_seed(0)
    q, k = torch.randn(4, 2, 20, 8), torch.randn(4, 2, 20, 8)
    plan = at_edm.prune(q, k, kept=7, rounds=3, shared=True)
    assert torch.equal(plan.owner[:2], plan.owner[2:])
    assert not torch.equal(at_edm.prune(q, k, kept=7, rounds=3).owner[0], plan.owner[0])


def plans_of(monkeypatch, name, config, fuse=False, **run):
    """A run of two steps: queries and keys of each ranking, computed apart from the patch, and its plan. And the result."""
    family, inputs, plans, found = FAMILIES[name], [], [], []
    pipe, prune = family.pipe(), at_edm.prune
    monkeypatch.setattr(at_edm, "prune", lambda *args: plans.append(prune(*args)) or plans[-1])
    model = Family.model(pipe)
    if fuse:
        model.fuse_qkv_projections()
    firsts = [each.blocks[0].attn for each in at_edm.transformers(describe(model))]
    for attn in firsts:
        attn.register_forward_pre_hook(lambda attn, args: inputs.append((attn, args[0])))
    with at_edm.apply(pipe, config):
        out = family.run(pipe, steps=2, **run)
    for attn, x in inputs:
        found.append([projection(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for projection in (attn.to_q, attn.to_k)])
    assert len(plans) == len(found) == 2 * len(firsts)
    return list(zip(found, plans, strict=True)), out


@pytest.mark.parametrize("name", ["sdxl", "dit"])
def test_the_plan_is_that_of_the_first_layer(monkeypatch, name):
    for (q, k), plan in plans_of(monkeypatch, name, at_edm.Config(ratio=0.5, early=0.0))[0]:
        assert torch.equal(plan.segments.source, at_edm.prune(q, k, q.shape[2] // 2, 4).segments.source)


def test_guidance_branches_share_a_ranking_if_asked_to(monkeypatch):
    config = at_edm.Config(ratio=0.5, early=0.0, shared=True)
    for _, plan in plans_of(monkeypatch, "sdxl", config, batch=2)[0]:
        assert torch.equal(plan.owner[:2], plan.owner[2:]) and not torch.equal(plan.owner[0], plan.owner[1])
    for _, plan in plans_of(monkeypatch, "sdxl", config, batch=2, guidance=1.0)[0]:
        assert not torch.equal(plan.owner[0], plan.owner[1])


def test_fused_projections_give_the_same(monkeypatch):
    config = at_edm.Config(ratio=0.5, early=0.0)
    expected = plans_of(monkeypatch, "pixart", config)[1]
    torch.testing.assert_close(plans_of(monkeypatch, "pixart", config, fuse=True)[1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_what_the_later_layers_cost(ratio):
    """Linear in the kept tokens but for self-attention, which is quadratic; the ranking comes on top."""
    pipe, C, N = FAMILIES["dit"].pipe(layers=4), 32, 64
    K = N - int(N * ratio)

    def layer(n):
        return 12 * n * C * C + 2 * n * n * C
    before = count_macs(lambda: FAMILIES["dit"].run(pipe, steps=1))
    with at_edm.apply(pipe, at_edm.Config(ratio=ratio, early=0.0, rounds=3)):
        after = count_macs(lambda: FAMILIES["dit"].run(pipe, steps=1))
    ranking = (1 + 3) * N * N * C + (N - K) * K * C
    assert before - after == 2 * (3 * (layer(N) - layer(K)) - ranking)


@pytest.mark.parametrize("early, steps, whole", [(0.7, 90, 63), (0.29, 100, 29), (0.3, 5, 1)])
def test_the_length_of_the_early_phase(early, steps, whole):
    pipe = FAMILIES["dit"].pipe(layers=2)
    with at_edm.apply(pipe, at_edm.Config(early=early)) as patch:
        FAMILIES["dit"].run(pipe, steps=steps)
        assert patch.report()["whole"] == whole


def sdxl_like():
    """Two levels with transformers of two and three layers, attention blocks as on SDXL."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32, 64), layers_per_block=2, cross_attention_dim=16, attention_head_dim=8,
        norm_num_groups=8, transformer_layers_per_block=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")).eval().requires_grad_(False)


def test_the_early_phase_of_sdxl_leaves_the_first_down_and_the_last_up_whole():
    found = at_edm.transformers(describe(sdxl_like()))
    assert [len(each.blocks) for each in found] == [2, 2, 3, 3, 3, 3, 3, 3, 2, 2, 2]    # down 1, 2, middle, up 0, 1
    assert [i for i, each in enumerate(found) if each.late] == [0, 2, 7, 10]


def test_on_a_unet_every_later_layer_sees_the_kept_tokens_only():
    pipe, lengths = FAMILIES["unet"].pipe(), []
    pipe.unet = sdxl_like()
    for block in describe(pipe.unet).blocks:
        block.attn.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    with at_edm.apply(pipe, at_edm.Config(ratio=0.63, early=0.5)) as patch:
        FAMILIES["unet"].run(pipe, steps=2)
        report = patch.report()
    fine, coarse = (64, 64 - int(0.63 * 64)), (16, 16 - int(0.63 * 16))                 # 8 x 8 and 4 x 4 tokens
    first, second = lengths[:28], lengths[28:]
    assert first[:4] == [64, 64, *fine] and first[4:10] == [16, 16, 16, coarse[0], coarse[1], coarse[1]]
    assert second[:4] == [*fine, *fine] and second[4:7] == [coarse[0], coarse[1], coarse[1]]
    assert report["whole"] == 4 and report["pruned"] == 7 + 11


def test_spared_levels_are_left_alone():
    pipe = FAMILIES["unet"].pipe()
    pipe.unet = sdxl_like()
    with at_edm.apply(pipe, at_edm.Config(spare=(1,), early=0.0)) as patch:
        FAMILIES["unet"].run(pipe, steps=2)
        assert patch.report()["pruned"] == 2 * 6


def test_kept_tokens_of_a_whole_model_pass_through_and_dropped_ones_are_copies():
    pipe, seen = FAMILIES["dit"].pipe(), {}
    blocks = pipe.transformer.transformer_blocks
    with at_edm.apply(pipe, at_edm.Config(ratio=0.5, early=0.0)):
        blocks[1].register_forward_hook(lambda _, args, out: seen.setdefault("short", out))
        blocks[-1].register_forward_hook(lambda _, args, out: seen.setdefault("full", out))
        FAMILIES["dit"].run(pipe, steps=1)
    assert seen["short"].shape[1] == 32 and seen["full"].shape[1] == 64
    for sample in seen["full"]:
        assert len(sample.unique(dim=0)) == 32                                          # every dropped one equals a kept one


def test_a_patch_inside_is_refused():
    from methods import tome
    pipe = FAMILIES["dit"].pipe()
    with tome.apply(pipe), pytest.raises(ValueError, match="cannot stack"):
        at_edm.apply(pipe)


def test_a_bare_model_is_refused():
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        at_edm.apply(FAMILIES["dit"].pipe().transformer)


@pytest.mark.parametrize("wrong, named", [({"ratio": 1.0}, "ratio=1.0"), ({"rounds": 0}, "rounds=0"),
                                          ({"early": 1.5}, "early=1.5"), ({"spare": 1}, "spare=1"),
                                          ({"spare": ("mid",)}, "spare=")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        at_edm.Config(**wrong)
