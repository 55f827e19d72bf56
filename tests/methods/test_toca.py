import math
from types import SimpleNamespace

import authors_dit
import pytest
import torch
from contracts import patch as contract
from families import FAMILIES
from test_macs import FORMS, WORDS, C, attention, block_macs, cross, linear

from methods import fora, toca, tome
from methods._core.attention import at_product, with_mass
from methods._core.patch import Patch


@pytest.mark.parametrize("check, case", contract.cases(toca, toca.Config(fresh=0.2)), ids=contract.name)
def test_contract(check, case):
    check(case)


def test_full_steps_of_dit():
    full = toca.full_steps(50, 3, "dit-ddim")
    assert [49 - i for i, _ in full] == [49, 45, 44, 40, 36, 32, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
    assert [49 - i for i, all_blocks in full if not all_blocks] == [45, 32]


def test_full_steps_of_dit_ddpm():
    partly = [249 - i for i, all_blocks in toca.full_steps(250, 4, "dit-ddpm") if not all_blocks]
    assert partly == [245, 155]
    assert sum(all_blocks for _, all_blocks in toca.full_steps(250, 4, "dit-ddpm")) == 72


def test_full_steps_of_pixart():
    full = toca.full_steps(20, 3, "pixart")
    assert [i for i, all_blocks in full if all_blocks] == [0, 6, 9, 12, 15, 18]
    assert [i for i, all_blocks in full if not all_blocks] == [4]


def test_full_steps_of_flux():
    assert [i for i, _ in toca.full_steps(12, 4, "flux")] == [0, 1, 2, 6, 10]
    assert [i for i, _ in toca.full_steps(12, 3, "flux", adaptive=False)] == [0, 3, 6, 9]


def test_full_steps_of_open_sora():
    assert [i for i, _ in toca.full_steps(14, 3, "open-sora")] == [0, 1, 2, 3, 6, 9, 12]


# Shenyi-Z/ToCa@e84096ffd85a, its cal_type and force_scheduler; an interval falls half-way between integers in each
@pytest.mark.parametrize("steps, interval, schedule, full", [
    (4, 2, "dit-ddim", [0, 1, 3]), (24, 7, "dit-ddim", [0, 1, 3, 13, 16, 17, 19, 21, 23]),
    (28, 4, "pixart", [0, 5, 10, 12, 16, 20, 24, 27])])
def test_full_steps_at_a_half(steps, interval, schedule, full):
    assert [i for i, _ in toca.full_steps(steps, interval, schedule)] == full


@pytest.mark.parametrize("left, block, ratio", [(49, 0, 0.0), (25, 0, 0.14), (25, 27, 0.21), (1, 27, 0.6132)])
def test_fresh_ratio_of_dit(left, block, ratio):
    assert toca.fresh_ratio("dit-ddim", 0.07, 49 - left, 50, block / 27, "ff") == pytest.approx(ratio, abs=1e-6)


def test_mean_share_of_renewed_tokens():
    shares = [int(toca.fresh_ratio("dit-ddim", 0.07, i, 50, block / 27, "ff") * 256) / 256
              for i in range(50) for block in range(28)]
    assert sum(shares) / len(shares) == pytest.approx(0.2007, abs=5e-5)


@pytest.mark.parametrize("schedule, kind, depth, ratio", [
    ("pixart", "cross", 0.0, 0.1 * 1.9 * 1.6 * 0.6), ("pixart", "ff", 1.0, 0.1 * 1.9 * 0.4 * 1.6), ("flux", "ff", 0, 0.06),
    ("flux", "total", 2, 0), ("open-sora", "cross", 0, 0), ("open-sora", "ff", 0, 0.1495)])
def test_other_fresh_ratios(schedule, kind, depth, ratio):
    assert toca.fresh_ratio(schedule, 0.1, 0, 20, depth, kind) == pytest.approx(ratio)


def test_spatial_bonus():
    assert toca.spread(torch.tensor([[1.0, 2, 3, 4]]), 2, 2, 2, 0.6).tolist() == [[1, 2, 3, pytest.approx(6.4)]]
    ragged = toca.spread(torch.arange(1.0, 16).view(1, 15), 3, 5, 2, 1.0).view(3, 5)
    assert (ragged[0] == torch.arange(1.0, 6)).all() and ragged[1].tolist() == [6, 14, 8, 18, 20]
    assert ragged[2].tolist() == [11, 24, 13, 28, 30]


@pytest.mark.parametrize("mean_first", [False, True])
def test_entropy_of_guidance_halves_is_the_same_for_both(mean_first):
    """That of the maps side by side, as released, or of their mean, as the formula has it."""
    maps = torch.rand(4, 6, 5, dtype=torch.float64).softmax(-1)
    value = toca.entropy(maps, True, mean_first)
    assert torch.equal(value[:2], value[2:])
    apart = (toca.entropy(maps[:2], False) + toca.entropy(maps[2:], False)) / 2 + math.log(2)
    whole = toca.entropy((maps[:2] + maps[2:]) / 2, False)
    assert not torch.allclose(apart, whole, atol=1e-2)
    torch.testing.assert_close(value[:2], whole if mean_first else apart, atol=2e-6, rtol=0)


def test_entropy_of_a_uniform_map():
    uniform = toca.entropy(torch.full((1, 3, 8), 0.125), guided=False)
    torch.testing.assert_close(uniform, torch.full((1, 3), 8.0).log(), atol=1e-5, rtol=1e-5)


def test_selection_prefers_the_important_then_the_stale():
    importance, stale = torch.tensor([[0.5, 0.1, 0.4, 0.1]]), torch.tensor([[0.0, 0, 0, 8]])
    assert toca.select(importance, torch.zeros(1, 4), 2, 4, 0.25).tolist() == [[0, 2]]
    assert toca.select(importance, stale, 2, 4, 0.25).tolist() == [[0, 3]]                 # 0.1 + 0.25 * 8 / 4 = 0.6


def test_without_fresh_tokens_it_is_fora():
    family = FAMILIES["dit"]
    pipe = family.pipe()
    with toca.apply(pipe, toca.Config(interval=3, fresh=0.0)):
        ours = family.run(pipe, steps=10)
    with fora.apply(pipe, fora.Config(interval=3)):
        theirs = family.run(pipe, steps=10)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["dit", "pixart", "flux", "latte"])
def test_full_steps_compute_what_the_model_computes(family):
    """`with_mass` stands in for the product on full steps: what a block computes must agree with the plain model."""
    pipe = FAMILIES[family].pipe()
    found = []
    blocks = [module for module in pipe.transformer.modules() if type(module).__name__ in (
        "BasicTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")]
    for block in blocks:
        attn = getattr(block, "attn1", None) or block.attn
        attn.register_forward_hook(lambda m, a, k, out: found.append((m, a, k, out)), with_kwargs=True)
    FAMILIES[family].run(pipe, steps=1)
    for attn, args, kwargs, out in found:
        mass = []

        def attend(product, *qkv, mass=mass, **more):
            out, received = with_mass(*qkv, **more)
            mass.append(received)
            return out
        ours, (mass,) = at_product(attend)(attn.forward, *args, **kwargs), mass
        for a, b in zip(*((value if isinstance(value, tuple) else (value,)) for value in (ours, out)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mass.sum(1), torch.full((len(mass),), float(mass.shape[1])))


def test_a_partial_step_renews_the_chosen_rows_and_no_others():
    pipe = FAMILIES["dit"].pipe()
    ff = pipe.transformer.transformer_blocks[1].ff
    with toca.apply(pipe, toca.Config(interval=4, fresh=0.2)) as patch:
        branch = next(f.__self__ for _, _, f in ff._patch_site.arounds)
        seen = []

        def watch(module, args, out):
            seen.append((branch.index is None, branch.index, args[0], out, branch.stale.value))

        ff.register_forward_hook(watch)
        FAMILIES["dit"].run(pipe, steps=12)
        assert patch.report()["partial"] > 2
    partial = [i for i, (full, index, *_) in enumerate(seen) if not full and index is not None]
    assert partial
    for i in partial:
        _, index, x, out, stale = seen[i]
        expected = type(ff).forward(ff, x)
        before = seen[i - 1][3]
        chosen = torch.zeros(out.shape[:2], dtype=torch.bool).scatter_(1, index, True)
        torch.testing.assert_close(out[chosen], expected[chosen], atol=1e-6, rtol=1e-5)
        assert torch.equal(out[~chosen], before[~chosen])
        assert (stale[chosen] == 0).all() and (stale[~chosen] > 0).all()
    assert all(stale is None for full, *_, stale in seen if full)


def test_attention_is_stale_and_every_mlp_row_fresh_at_full_ratio():
    pipe = FAMILIES["dit"].pipe()
    rows = []
    for block in pipe.transformer.transformer_blocks:
        block.ff.net[0].register_forward_hook(lambda m, a, out: rows.append(a[0].shape[1]))
    with toca.apply(pipe, toca.Config(interval=4, fresh=1.0, schedule="open-sora")):
        FAMILIES["dit"].run(pipe, steps=10)
    assert set(rows) == {64}


# Shenyi-Z/ToCa@e84096ffd85a, DiT-ToCa (ToCa-ddim50, attention score, N = 3, ratio 0.2) with the weights of `authors_dit`
OFFICIAL = [[-0.51026, -0.162333], [-0.159069, 0.14057], [-0.502001, -0.210592], [-0.561914, -0.364512],
            [-0.800216, -0.501826], [-0.602162, -0.327696], [-0.388787, -0.054959], [-0.61827, -0.450792],
            [-0.590896, -0.363016], [-0.557258, -0.295735], [-0.570567, -0.359517], [-0.587324, -0.332077]]


def test_equals_the_official_code():
    pipe = authors_dit.pipeline(layers=28)
    with toca.apply(pipe, toca.Config(interval=3, fresh=0.2, per_block_decision=True)):
        ours = authors_dit.answers(pipe, 12)
    torch.testing.assert_close(ours, torch.tensor(OFFICIAL, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_count_that_is_a_whole_number_is_not_cut_short():
    """0.3 x 1 x 10/9 x 2.5 of 36 tokens are 30; in double precision the product is a little less."""
    ratio = toca.fresh_ratio("dit-ddim", 0.3, 24, 50, 21 / 27, "ff")
    assert 29.99 < ratio * 36 < 30
    pipe = FAMILIES["dit"].pipe()
    layers = toca.Layers(Patch(pipe, "toca"), toca.Config(fresh=0.3))
    branch = next(each for each in layers.branches)
    branch.depth, branch.slot.value, branch.mass.value = 21 / 27, torch.zeros(2, 36, 8), torch.rand(2, 36)
    call = SimpleNamespace(sample=torch.zeros(2), i=24, steps=50, grid=lambda block: (1, 6, 6))
    assert layers._choose(branch, call).shape == (2, 30)


def test_the_entropy_of_pixart_is_the_released_one_unless_asked():
    """And the other way chooses other tokens."""
    found = []
    for config in (toca.Config(fresh=0.3), toca.Config(fresh=0.3, mean_map_entropy=True)):
        pipe = FAMILIES["pixart"].pipe()
        with toca.apply(pipe, config):
            found.append(FAMILIES["pixart"].run(pipe, steps=6))
    assert not torch.equal(*found)


def test_guidance_halves_of_pixart_choose_the_same_tokens():
    pipe = FAMILIES["pixart"].pipe()
    with toca.apply(pipe, toca.Config(fresh=0.3)):
        ff = pipe.transformer.transformer_blocks[0].ff
        branch = next(f.__self__ for _, _, f in ff._patch_site.arounds)
        FAMILIES["pixart"].run(pipe, steps=6)
        assert torch.equal(branch.index[0], branch.index[1])


def test_per_block_decision_repeats_the_released_code():
    pipe = FAMILIES["dit"].pipe()
    calls = {0: 0, 1: 0}
    for i in calls:
        pipe.transformer.transformer_blocks[i].attn1.to_v.register_forward_hook(
            lambda *_, i=i: calls.update({i: calls[i] + 1}))
    with toca.apply(pipe, toca.Config(per_block_decision=True)):
        FAMILIES["dit"].run(pipe, steps=50)
    assert calls == {0: 20, 1: 18}


def test_it_ranks_all_tokens_so_none_may_be_merged_in_the_attention_it_reads():
    pipe = FAMILIES["dit"].pipe()
    for first, second in ((toca, tome), (tome, toca)):
        with first.apply(pipe), pytest.raises(ValueError, match="both change the attention of the same Attention"):
            second.apply(pipe)


@pytest.mark.parametrize("wrong, named", [({"interval": 0}, "interval=0"), ({"fresh": 1.5}, "fresh=1.5"),
                                          ({"schedule": "sd"}, "schedule='sd'"), ({"cell": 0}, "cell=0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        toca.Config(**wrong)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_partly_renewed_block(name):
    """Attention is reused; k rows pass the MLP and the cross-attention, whose map is formed again to score them."""
    config = toca.Config(fresh=0.2, schedule="pixart")
    counted, batch, n = block_macs(name, lambda pipe: toca.apply(pipe, config))

    def rows(kind):
        return int(n * toca.fresh_ratio("pixart", config.fresh, 1, 2, 0.0, kind))

    k = rows("cross")
    scored = attention(k, WORDS) // 2
    crossing = cross(k, C) + scored if name == "pixart" else 0
    assert 0 < k < rows("ff") < n
    assert counted == batch * (crossing + linear(rows("ff"), 8) + FORMS[name].kept)
