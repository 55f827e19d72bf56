import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contracts import patch as contract
from families import FAMILIES

from accel_tools.measure.macs import count_macs
from methods import headrouter, stable_flow
from methods._core.denoiser import describe
from methods.headrouter import OFF, Config

FLUX, SD3 = FAMILIES["flux"], FAMILIES["sd3"]
PAIR = dict(batch=2, twins=True)


@pytest.mark.parametrize("check, case", contract.cases(headrouter, Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


def edited(family, config, pipe=None, **setting):
    pipe = pipe or family.pipe()
    with headrouter.apply(pipe, config) as patch:
        return family.run(pipe, **PAIR | setting), patch.report()


# ---- routing ----------------------------------------------------------------------------------------------------------

def at_angles(c):
    """Head outputs (1, H, 1, 2) of a source and of an edit whose cosines are c."""
    c = torch.tensor(c, dtype=torch.float64)
    source = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, len(c), 1, 2)
    return source, torch.stack([c, (1 - c ** 2).sqrt()], -1)[None, :, None]


def test_weights_worked_by_hand():
    r = headrouter.dissimilarity(*at_angles([1.0, 0.9, 0.5]))
    torch.testing.assert_close(r, torch.tensor([[0, 0.2, 1]]), atol=1e-6, rtol=0)
    w = headrouter.weights(r, 0.2, 0.5)
    torch.testing.assert_close(w, torch.tensor([[1.07551, 1.08511, 1.12449]]), atol=5e-6, rtol=0)


def test_heads_that_are_alike_are_all_weighed_up():
    """Equal similarities, also those of an edit with the prompt of its source, are r = 0, which is not the identity."""
    for c in ([0.3, 0.3, 0.3], [1.0, 1.0]):
        r = headrouter.dissimilarity(*at_angles(c))
        assert r.abs().max() < 0.2 and r.min() == 0                            # rounding over the guard of 1e-6
    x = torch.randn(2, 4, 5, 3)
    assert headrouter.dissimilarity(x, x).max() < 0.5
    assert float(headrouter.weights(torch.zeros(1), 0.2, 0.5)) == pytest.approx(1.07551, abs=5e-6)
    assert float(headrouter.weights(torch.ones(1), 0.0, 0.5)) == 1


def test_less_alike_heads_get_more():
    c = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    w = headrouter.weights(headrouter.dissimilarity(*at_angles(c)), 0.2, 0.5)[0]
    assert w.argsort().tolist() == torch.tensor(c).argsort(descending=True).tolist()
    assert 1.0755 < w.min() < w.max() < 1.1245


def test_the_scale_of_an_edit_does_not_matter():
    source, edit = torch.randn(2, 3, 4, 7, 5, generator=torch.Generator().manual_seed(1))
    r = headrouter.dissimilarity(source, edit)
    torch.testing.assert_close(headrouter.dissimilarity(source, 3 * edit), r)
    by_loop = [F.cosine_similarity(source[0, h].flatten(), edit[0, h].flatten(), dim=0) for h in range(4)]
    expected = [(max(by_loop) - c) / (max(by_loop) - min(by_loop)) for c in by_loop]
    torch.testing.assert_close(r[0], torch.stack(expected))


@pytest.mark.parametrize("alpha, tokens, expected", [(2.0, 4096, 1.00061), (5.0, 4096, 2.50153)])
def test_the_gate_of_even_tokens(alpha, tokens, expected):
    a = torch.full((1, tokens, 3), 0.7, dtype=torch.float64)
    torch.testing.assert_close(headrouter.enhanced(a, alpha, 5.0), a * expected, atol=1e-5, rtol=0)


def test_the_gate_by_hand():
    a = torch.tensor([[0.0, 1.0], [math.log(3), 1.0]])
    u = torch.tensor([[0.25, 0.5], [0.75, 0.5]])                               # sums to 1 over tokens
    torch.testing.assert_close(headrouter.enhanced(a, 2.0, 5.0), a * 2 / (1 + (-5 * u).exp()))


# ---- against the released code ----------------------------------------------------------------------------------------

def by_hand(pipe, config, words=5):
    """The released formulas in the attention product and between blocks, for a source in row 0 and one edit, the source left
    as it is. Behind norms and positions; of single blocks on the joined heads."""
    product, blocks = F.scaled_dot_product_attention, describe(pipe.transformer).blocks
    names = {id(block.attn): block.stream for block in blocks}
    before = {}

    def route(out, single):
        v_r, v_e = out[0].reshape(out.shape[1], -1), out[1].reshape(out.shape[1], -1)
        c = F.cosine_similarity(v_r, v_e, dim=1)
        d = (c.max() - c) / (c.max() - c.min()).clamp(min=1e-6)
        out[1] = out[1] * (1.0 + config.gamma * torch.sigmoid(d - config.delta)).view(-1, 1, 1)
        if single:
            joined = out.transpose(1, 2).flatten(2).clone()
            a = joined[1, words:]
            joined[1, words:] = config.alpha * torch.sigmoid(config.upsilon * torch.softmax(a, dim=0)) * a
            out = joined.unflatten(2, (out.shape[1], -1)).transpose(1, 2)
        return out

    def wrap(attn):
        forward = attn.forward

        def run(*args, **kwargs):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(F, "scaled_dot_product_attention",
                                lambda *a, **k: route(product(*a, **k).clone(), names[id(attn)] == "fused"))
                return forward(*args, **kwargs)
        attn.forward = run

    def blend(i, block):
        forward = block.module.forward

        def run(hidden_states, encoder_hidden_states, **kwargs):
            text = encoder_hidden_states
            if i > 0:
                text = text.clone()
                text[1] = config.blend * before["text"][1] + (1 - config.blend) * text[1]
            before["text"] = text
            return forward(hidden_states, text, **kwargs)
        block.module.forward = run

    for i, block in enumerate(blocks):
        wrap(block.attn)
        if block.stream == "joint":
            blend(i, block)
    return pipe


@pytest.mark.parametrize("config", [Config(), Config(alpha=5.0, upsilon=3.0, gamma=0.7, delta=0.1, blend=0.3)])
def test_a_run_equals_the_released_formulas(config):
    ours, other = FLUX.pipe(), FLUX.pipe()
    for pipe in (ours, other):
        pipe.transformer.double()
    out, report = edited(FLUX, config, ours)
    expected = FLUX.run(by_hand(other, config), **PAIR)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert report["routed"] == 4 * 4 and report["overhead_rows"] == 4


@pytest.mark.parametrize("family", [FLUX, SD3], ids=str)
def test_the_source_is_the_plain_one_to_the_bit(family):
    plain = family.run(family.pipe(), **PAIR)
    for config in (Config(), Config(alpha=None), Config(gamma=0.0, blend=0.0), Config(gamma=0.0, alpha=None)):
        out, _ = edited(family, config)
        assert torch.equal(out[0], plain[0])
        if family is FLUX or config.gamma or config.blend:
            assert not torch.equal(out[1], plain[1])


def test_several_edits_are_routed_by_themselves():
    three, _ = edited(FLUX, Config(), batch=3)
    two, _ = edited(FLUX, Config())
    torch.testing.assert_close(three[:2], two, atol=1e-5, rtol=1e-4)
    assert not torch.equal(three[1], three[2])


def test_halves_of_guidance_are_routed_by_themselves():
    pipe, pairs, real = SD3.pipe(), [], headrouter.dissimilarity
    with headrouter.apply(pipe), pytest.MonkeyPatch.context() as patched:
        patched.setattr(headrouter, "dissimilarity", lambda source, edit: pairs.append((source, edit)) or real(source, edit))
        SD3.run(pipe, steps=1, batch=3, twins=True)
    for source, edit in pairs:
        assert torch.equal(source, edit[[0, 0, 0, 3, 3, 3]])
    assert len(pairs) == 3


def test_text_that_does_not_change_is_a_fixed_point():
    """And the first block reads it as it is."""
    rows, before = headrouter._Rows(), {}
    rows.edit = torch.tensor([False, True])[:, None, None]
    blocks = describe(FLUX.pipe().transformer).blocks[:2]
    texts = [headrouter._Text(block, rows, 0.1, before) for block in blocks]
    texts[1].first = False
    given, text, other = [], torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    for each, x in ((texts[0], text), (texts[1], text), (texts[1], other)):
        each.around(lambda x, y: given.append(y), torch.zeros(2, 4, 32), x)
    assert torch.equal(given[0], text)
    torch.testing.assert_close(given[1], text)
    assert torch.equal(given[2][0], other[0])
    torch.testing.assert_close(given[2][1], 0.1 * text[1] + 0.9 * other[1])


# ---- real images ------------------------------------------------------------------------------------------------------

def latent(seed=3):
    return torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(seed))


def call(steps, batch=1):
    return FLUX.call(batch, 0) | {"height": 32, "width": 32, "num_inference_steps": steps}


def test_a_full_controller_arrives_at_the_image():
    """Each step goes along (z - z_0) / t, whatever the model says; sources and edits alike."""
    pipe, z0 = FLUX.pipe(), latent()
    with headrouter.apply(pipe, replace(Config(), image=z0, eta=1.0, stop=5)):
        out = FLUX.run(pipe, steps=5, **PAIR)
    torch.testing.assert_close(out, z0.expand(2, -1, -1), atol=1e-4, rtol=1e-4)
    plain = FLUX.run(pipe, steps=5, **PAIR)
    for more in (dict(stop=0), dict(eta=0.0)):
        with headrouter.apply(pipe, replace(OFF, image=z0, **more)):
            assert torch.equal(FLUX.run(pipe, steps=5, **PAIR), plain)


def test_the_controller_by_hand():
    """v + eta ((z - z_0) / t - v) in steps 1 and 2 of 4."""
    pipe, z0, seen = FLUX.pipe(), latent(), []
    pipe.transformer.register_forward_hook(lambda _, args, given, out: (given["hidden_states"] * 0.5,), with_kwargs=True)
    with headrouter.apply(pipe, replace(OFF, image=z0, eta=0.6, start=1, stop=3)):
        pipe(**call(4, 2), latents=latent(5).repeat(2, 1, 1), output_type="latent",
             callback_on_step_end=lambda pipe, i, t, given: seen.append(given["latents"].clone()) or given)
    sigmas, z = pipe.scheduler.sigmas.tolist(), latent(5)
    for i, found in enumerate(seen):
        v = 0.5 * z
        if i in (1, 2):
            v = v + 0.6 * ((z - z0) / sigmas[i] - v)
        z = z + (sigmas[i + 1] - sigmas[i]) * v
        torch.testing.assert_close(found, z.repeat(2, 1, 1), atol=1e-5, rtol=1e-5)


def test_an_inversion_of_full_strength_goes_straight_to_the_noise():
    pipe = FLUX.pipe()
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(7))
    found = headrouter.invert(pipe, latent(), Config(strength=1.0, seed=7), **call(5))
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=1e-4)
    plain = headrouter.invert(pipe, latent(), Config(strength=0.0), **call(5))
    expected = stable_flow.invert(pipe, latent(), stable_flow.Config(nudge=1.0), **call(5))[-1]
    assert torch.equal(plain, expected) and not torch.equal(found, plain)
    half = headrouter.invert(pipe, latent(), Config(seed=7), **call(5))
    assert (half - noise).norm() < (plain - noise).norm()


def test_the_overhead_is_the_row_beside_the_edit():
    """Products of matrices are those of a plain run for both prompts, which are twice those for one."""
    costs = []
    for config, batch in ((None, 1), (None, 2), (Config(), 2)):
        pipe = FLUX.pipe()
        patch = None if config is None else headrouter.apply(pipe, config)
        costs.append(count_macs(lambda pipe=pipe, batch=batch: FLUX.run(pipe, steps=2, batch=batch, twins=True)))
        assert patch is None or patch.report()["overhead_rows"] == 2
    assert costs[1] == costs[2] and costs[1] == pytest.approx(2 * costs[0], rel=0.02)


# ---- refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [{"gamma": -0.1}, {"alpha": 0.0}, {"blend": 1.1}, {"eta": -1.0}, {"strength": 2.0},
                                   {"start": 3, "stop": 2}, {"upsilon": math.inf}])
def test_bad_values_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="no attention over text and image together"):
        headrouter.apply(FAMILIES["pixart"].pipe())
    pipe = FLUX.pipe()
    pipe.scheduler = FAMILIES["unet"].pipe().scheduler
    for refused in (lambda: headrouter.apply(pipe, Config(image=latent())), lambda: headrouter.invert(pipe, latent())):
        with pytest.raises(ValueError, match="follows none"):
            refused()
    pipe = FLUX.pipe()
    with headrouter.apply(pipe), pytest.raises(ValueError, match="two prompts or more"):
        FLUX.run(pipe)
    with pytest.raises(ValueError, match="cannot stack"):
        with headrouter.apply(pipe), stable_flow.apply(pipe, stable_flow.TINY):
            pass
