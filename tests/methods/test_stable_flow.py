import pytest
import torch
from contracts import patch as contract
from diffusers import FluxTransformer2DModel
from families import FAMILIES

import methods
from accel_tools.measure.macs import count_macs
from methods import stable_flow
from methods._core.denoiser import describe
from methods.stable_flow import TINY, Config

FLUX, SD3 = FAMILIES["flux"], FAMILIES["sd3"]
PAIR = dict(batch=2, twins=True)


@pytest.mark.parametrize("check, case", contract.cases(stable_flow, TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def edited(family, config, pipe=None, **setting):
    pipe = pipe or family.pipe()
    with stable_flow.apply(pipe, config) as patch:
        return family.run(pipe, **PAIR | setting), patch.report()


# ---- injection --------------------------------------------------------------------------------------------------------

def test_attention_worked_by_hand():
    """One token of text, one of the image: with q = 0 the edit gets the mean of its text and of the reference's image."""
    block = describe(FLUX.pipe().transformer).blocks[0]
    layer = stable_flow._Layer(block)
    layer.rows, layer.tokens = torch.tensor([0, 0]), 1
    v = torch.tensor([[[[7.0], [4.0]]], [[[2.0], [100.0]]]])
    q = torch.zeros_like(v)
    product = torch.nn.functional.scaled_dot_product_attention
    assert layer.attend(product, q, v, v)[1].flatten().tolist() == [3, 3]
    assert product(q, v, v)[1].flatten().tolist() == [51, 51]


def test_text_is_never_exchanged_nor_are_queries():
    given = []
    for family, words in ((FLUX, slice(0, 5)), (SD3, slice(64, None))):
        block = describe(family.model(family.pipe())).blocks[0]
        layer = stable_flow._Layer(block)
        layer.rows, layer.tokens = torch.tensor([0, 0, 2, 2]), 64
        q, k, v = (torch.randn(4, 2, 69, 8) for _ in range(3))
        layer.attend(lambda *qkv: given.append(qkv) or qkv[0], q, k, v)
        assert torch.equal(given[-1][0], q)
        image = slice(5, None) if words.start == 0 else slice(0, 64)
        for x, made in ((k, given[-1][1]), (v, given[-1][2])):
            assert torch.equal(made[:, :, words], x[:, :, words])
            assert torch.equal(made[:, :, image], x[[0, 0, 2, 2]][:, :, image])


def test_calls_of_guidance_by_themselves():
    """Where it calls the model twice, the second call is the unconditional one, which stays as it is."""
    wan, given = FAMILIES["wan"], []
    pipe = wan.pipe()
    with stable_flow.apply(pipe, TINY) as patch, pytest.MonkeyPatch.context() as patched:
        real = stable_flow.injected
        patched.setattr(stable_flow, "injected", lambda x, r: given.append(r.tolist()) or real(x, r))
        wan.run(pipe, steps=1, **PAIR)
        assert patch.report()["injected"] == 2
    assert given == [[0, 0]] * 4 + [[0, 1]] * 4


def test_frames_are_taken_from_the_same_frame():
    x = torch.arange(6.0).view(6, 1, 1, 1)                                    # two samples of three frames
    assert stable_flow.injected(x, torch.tensor([0, 0])).flatten().tolist() == [0, 1, 2, 0, 1, 2]


def before_the_norms(pipe, vital, words=5):
    """The official processors: projections of row 0 copied over those of the others, before norms and positions."""
    blocks = describe(pipe.transformer).blocks
    for block in (blocks[i] for i in vital):
        start = words if block.stream == "fused" else 0

        def copied(_, args, out, start=start):
            out = out.clone()
            out[1:, start:] = out[:1, start:]
            return out
        block.attn.to_k.register_forward_hook(copied)
        block.attn.to_v.register_forward_hook(copied)
    return pipe


@pytest.mark.parametrize("vital", [(0,), (2,), (1, 3), (0, 1, 2, 3)])
def test_copies_behind_the_norms_are_the_official_ones_before_them(vital):
    out, report = edited(FLUX, Config(vital=vital), batch=3)
    expected = FLUX.run(before_the_norms(FLUX.pipe(), vital), batch=3, twins=True)
    assert torch.equal(out, expected)
    assert report["injected"] == 4 * len(vital) * 2 and report["overhead_rows"] == 4


@pytest.mark.parametrize("family", [FLUX, SD3], ids=str)
def test_the_reference_is_the_plain_one_to_the_bit(family):
    plain = family.run(family.pipe(), **PAIR)
    out, _ = edited(family, TINY)
    assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])


@pytest.mark.parametrize("family", [FLUX, SD3], ids=str)
@pytest.mark.parametrize("vital", [(1,), (0, 1, 2)])
def test_an_edit_with_the_prompt_of_its_reference_is_the_reference(family, vital):
    pipe, call = family.pipe(), family.call(1, 0)
    same = {name: value.expand(2, *value.shape[1:]) for name, value in call.items() if torch.is_tensor(value)}
    out, _ = edited(family, Config(vital=vital), pipe, **same)
    assert torch.equal(out[0], out[1])


def test_of_guidance_the_conditional_half_is_edited():
    rows = []
    pipe = SD3.pipe()
    with stable_flow.apply(pipe, TINY):
        real = stable_flow.injected
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(stable_flow, "injected", lambda x, r: rows.append(r.tolist()) or real(x, r))
            SD3.run(pipe, steps=1, batch=3, twins=True)
    assert set(map(tuple, rows)) == {(0, 1, 2, 3, 3, 3)}


# ---- vital layers -----------------------------------------------------------------------------------------------------

def test_vital_layers_of_a_list():
    assert stable_flow.vital_layers([0.5, 0.1, 0.2, 0.0], 0.2) == (0, 2)
    assert len(stable_flow.VITAL["flux-dev"]) == 10
    assert set(stable_flow.VITAL["flux-dev"]) - set(stable_flow.VITAL["flux-dev-released"]) == {2}


@pytest.mark.parametrize("family", [FLUX, SD3], ids=str)
def test_a_layer_without_gates_is_not_vital(family):
    """It is the identity, so that without it nothing changes; it ranks last."""
    pipe = family.pipe()
    plain, blocks = family.run(pipe), describe(pipe.transformer).blocks
    dead = 1
    for norm in (blocks[dead].module.norm1, blocks[dead].module.norm1_context):
        norm.linear.weight.data.zero_()
        norm.linear.bias.data.zero_()
    found = stable_flow.vitality(pipe, lambda: family.run(pipe))
    assert found[dead] == pytest.approx(0, abs=1e-12) and sorted(found)[1] > 1e-4
    assert len(found) == len(blocks) and all(-1e-12 <= each <= 2 for each in found)
    assert not torch.equal(family.run(pipe), plain)


def test_vitality_is_the_distance_of_features_without_a_layer():
    pipe = FLUX.pipe()
    whole = FLUX.run(pipe, batch=2)
    found = stable_flow.vitality(pipe, lambda: FLUX.run(pipe, batch=2), lambda x: x.mean(1))
    assert torch.equal(FLUX.run(pipe, batch=2), whole)
    other = FLUX.pipe()
    block = describe(other.transformer).blocks[3]
    block.module.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    without = FLUX.run(other, batch=2)
    a, b = whole.mean(1), without.mean(1)
    expected = 1 - ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()
    assert found[3] == pytest.approx(float(expected), abs=1e-6)


# Of the random models of the families, by their latents of 4 steps from one seed.
MEASURED = {"flux": (0.0582, 0.0589, 0.0143, 0.0311), "sd3": (0.0383, 0.0243, 0.0194)}


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_measured_vitalities_of_the_families(name):
    pipe = FAMILIES[name].pipe()
    assert stable_flow.vitality(pipe, lambda: FAMILIES[name].run(pipe)) == pytest.approx(MEASURED[name], abs=2e-4)


@pytest.mark.slow
def test_the_bundled_vital_layers_are_those_measured():
    from accel_tools.measure import stable_flow as measured
    found = measured.vitalities(methods.tiny("mmdit"), samples=8, steps=8)
    assert stable_flow.vital_layers(found, measured.TAU) == stable_flow.VITAL["mmdit"]


# ---- real images ------------------------------------------------------------------------------------------------------

def flowing(family, velocity):
    """A pipeline whose model says `velocity(z)`."""
    pipe = family.pipe()
    pipe.transformer.register_forward_hook(lambda _, args, given, out: (velocity(given["hidden_states"]),), with_kwargs=True)
    return pipe


def latent(family, seed=3):
    shape = {"flux": (1, 64, 16), "sd3": (1, 4, 16, 16)}[family.name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(family, steps, batch=1):
    sizes = dict(zip(("height", "width"), family.sizes[0], strict=True))
    return family.call(batch, 0) | sizes | {"num_inference_steps": steps}


@pytest.mark.parametrize("family", [FLUX, SD3], ids=str)
def test_a_constant_velocity_is_walked_back_and_forth(family):
    pipe, z0 = flowing(family, lambda z: torch.full_like(z, 0.5)), latent(family)
    passed = stable_flow.invert(pipe, z0, Config(nudge=1.0), **call(family, 5))
    assert len(passed) == 6 and torch.equal(passed[0], z0)
    torch.testing.assert_close(passed[-1], z0 + 0.5)                         # noise level 1
    again = pipe(**call(family, 5), guidance_scale=1.0, latents=passed[-1], output_type="latent").images
    torch.testing.assert_close(again, z0)


def test_a_velocity_of_z_by_hand():
    """One step of 0.1 along u(z) = z: up by 1.1, then down by 0.9."""
    pipe, z0 = flowing(FLUX, lambda z: z), latent(FLUX)
    more = call(FLUX, 1) | {"sigmas": [0.1]}
    passed = stable_flow.invert(pipe, z0, Config(nudge=1.0), **more)
    torch.testing.assert_close(passed[1], 1.1 * z0)
    again = pipe(**more, latents=passed[1], output_type="latent").images
    torch.testing.assert_close(again, 0.99 * z0)


def test_the_clean_latent_is_nudged():
    pipe, z0 = FLUX.pipe(), latent(FLUX)
    assert torch.equal(stable_flow.invert(pipe, z0, **call(FLUX, 2))[0], 1.15 * z0)


def levels(config, steps=4, pipe=None):
    """The latents of a run of a reference and an edit after each step, and what the inversion passed."""
    pipe, seen = pipe or FLUX.pipe(), []
    passed = stable_flow.invert(pipe, latent(FLUX), Config(), **call(FLUX, steps))
    with stable_flow.apply(pipe, Config(inverted=passed, **config)) as patch:
        pipe(**call(FLUX, steps, 2), latents=passed[-1].repeat(2, 1, 1), output_type="latent",
             callback_on_step_end=lambda pipe, i, t, given: seen.append(given["latents"].clone()) or given)
        assert patch.report()["injected"] == steps * len(patch.also or config["vital"])
    return seen, passed


def test_the_reference_runs_down_the_inverted_latents_to_the_image():
    seen, passed = levels({"vital": (0, 2)})
    assert all(torch.equal(z[0], passed[level][0]) for z, level in zip(seen, (3, 2, 1, 0), strict=True))
    assert all(not torch.equal(z[1], z[0]) for z in seen)


def test_the_released_index_lags_by_two_levels():
    """list[-i] of the latents 1 to 4, as in the official loop."""
    seen, passed = levels({"vital": (0,), "released": True})
    stored = passed[1:]
    assert all(torch.equal(z[0], stored[-i][0]) for i, z in enumerate(seen))


def test_the_scale_can_be_taken_back_at_the_end():
    seen, passed = levels({"vital": (0,), "restore": True})
    torch.testing.assert_close(seen[-1][0], latent(FLUX)[0])
    assert torch.equal(seen[-2][0], passed[1][0])


def test_guidance_of_the_reference_is_its_own():
    pipe, told = FLUX.pipe(), []
    config = {name: value for name, value in pipe.transformer.config.items() if name[0] != "_"} | {"guidance_embeds": True}
    pipe.register_modules(transformer=FluxTransformer2DModel(**config).eval())
    passed = stable_flow.invert(pipe, latent(FLUX), **call(FLUX, 2))
    with stable_flow.apply(pipe, Config(vital=(0,), inverted=passed)):
        pipe.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: told.append(args[1].tolist()))
        pipe(**call(FLUX, 2, 3), guidance_scale=3.0, latents=passed[-1].repeat(3, 1, 1), output_type="latent")
    assert told == [[1000, 3000, 3000]] * 2


def test_the_overhead_is_the_row_beside_the_edit():
    """Products of matrices are those of a plain run for both prompts, which are twice those for one."""
    costs = []
    for config, batch in ((None, 1), (None, 2), (TINY, 2)):
        pipe = FLUX.pipe()
        patch = None if config is None else stable_flow.apply(pipe, config)
        costs.append(count_macs(lambda pipe=pipe, batch=batch: FLUX.run(pipe, steps=2, batch=batch, twins=True)))
        assert patch is None or patch.report()["overhead_rows"] == 2
    assert costs[1] == costs[2] and costs[1] == pytest.approx(2 * costs[0], rel=0.02)


# ---- refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, named", [({"vital": (-1,)}, "vital="), ({"nudge": 0.0}, "nudge=0.0"),
                                          ({"inverted": [torch.zeros(1)]}, "inverted must hold")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    pipe = FLUX.pipe()
    with pytest.raises(ValueError, match="has 4 layers; find its vital ones"):
        stable_flow.apply(pipe)
    with pytest.raises(ValueError, match="no chain of transformer blocks"):
        stable_flow.apply(FAMILIES["unet"].pipe(), TINY)
    with stable_flow.apply(pipe, TINY):
        with pytest.raises(ValueError, match="two prompts or more"):
            FLUX.run(pipe)
        with pytest.raises(ValueError, match="from the noise of its reference"):
            FLUX.run(pipe, batch=2)
        with pytest.raises(ValueError, match="already on"):
            stable_flow.invert(pipe, latent(FLUX), **call(FLUX, 2))
    passed = stable_flow.invert(pipe, latent(FLUX), **call(FLUX, 2))
    with stable_flow.apply(pipe, Config(vital=(0,), inverted=passed)):
        with pytest.raises(ValueError, match="inverted in 2 steps, and this run has 3"):
            pipe(**call(FLUX, 3, 2), latents=passed[-1].repeat(2, 1, 1), output_type="latent")
    with pytest.raises(ValueError, match="one image is inverted at a time"):
        stable_flow.invert(pipe, latent(FLUX).repeat(2, 1, 1), **call(FLUX, 2))
    other = FAMILIES["pixart"].pipe()
    for refused in (lambda: stable_flow.invert(other, torch.zeros(1, 4, 16, 16)),
                    lambda: stable_flow.apply(other, Config(vital=(0,), inverted=passed))):
        with pytest.raises(ValueError, match="follows none"):
            refused()
