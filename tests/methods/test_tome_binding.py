import math

import pytest
import torch
from contracts import patch as contract
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from families import FAMILIES, WIDTH, WORDS, text

from methods import tome, tome_binding
from methods._core.attention import mean_map

OBJECTS = (((2,), (1,)), ((4,), (3,)))
PHRASES = torch.randn(3, WORDS, WIDTH, generator=torch.Generator().manual_seed(9))
FULL = tome_binding.Config(objects=OBJECTS, anchors=tuple(PHRASES[:2]), simplified=PHRASES[2], length=3 + 1, token_steps=2,
                           attention_steps=2, token_rate=10.0, attention_updates=(2, 2))
@pytest.mark.parametrize("check, case", contract.cases(tome_binding, FULL), ids=contract.name)
def test_contract(check, case):
    check(case)


def run(config, **setting):
    family = FAMILIES["unet"]
    pipe = family.pipe()
    with tome_binding.apply(pipe, config) as patch:
        return family.run(pipe, **setting), patch.report()


def test_merging_sums_a_phrase_into_its_first_noun():
    text = torch.randn(2, 8, 4)
    merged = tome_binding.merge_tokens(text, (((2,), (1,)), ((5, 6), (4, 7))))
    torch.testing.assert_close(merged[:, 2], 1.1 * text[:, 2] + 1.2 * text[:, 1])
    torch.testing.assert_close(merged[:, 5], 1.1 * (text[:, 5] + text[:, 6]) + 1.2 * (text[:, 4] + text[:, 7]))
    assert not merged[:, [1, 4, 6, 7]].any()
    assert torch.equal(merged[:, [0, 3]], text[:, [0, 3]])


def test_a_noun_without_modifiers_is_only_scaled():
    text = torch.randn(1, 5, 4)
    merged = tome_binding.merge_tokens(text, (((2,), ()),))
    torch.testing.assert_close(merged[:, 2], 1.1 * text[:, 2])
    assert torch.equal(merged[:, [0, 1, 3, 4]], text[:, [0, 1, 3, 4]])


def test_end_substitution_changes_only_what_follows_the_prompt():
    text, simplified = torch.randn(2, 8, 4), torch.randn(8, 4)
    replaced = tome_binding.replace_end(text, simplified, 5)
    assert torch.equal(replaced[:, :6], text[:, :6])
    assert torch.equal(replaced[:, 6:], simplified[6:].expand(2, -1, -1))


def test_entropy_of_a_point_of_a_plane_and_of_maps_written_out():
    point = torch.zeros(1, 1024, 4)
    point[0, 100, 2] = 5.0
    assert tome_binding.entropy_loss(point, [2], 3).item() == pytest.approx(0, abs=1e-3)
    assert tome_binding.uniform_entropy(1024, 1) == pytest.approx(13.843, abs=1e-3)
    wide = torch.zeros(1, 1024, 4)
    wide[0, ::2, 2] = 5.0                                                  # half of the places, evenly
    assert tome_binding.entropy_loss(wide, [2], 3).item() == pytest.approx(tome_binding.uniform_entropy(512, 1), abs=1e-4)
    maps = torch.rand(2, 36, 6)
    for b in range(2):
        total = 0.0
        for noun in (2, 4):
            weight = [[math.exp(2 * float(maps[b, n, t])) for t in range(1, 5)] for n in range(36)]
            share = [row[noun - 1] / sum(row) for row in weight]
            share = [(value - min(share)) / (max(share) - min(share)) for value in share]
            total -= 2 * sum(value / sum(share) * math.log(value / sum(share) + 1e-5) for value in share)
        assert tome_binding.entropy_loss(maps, [2, 4], 4)[b].item() == pytest.approx(total, rel=1e-4)


def test_a_flat_map_is_an_even_one():
    """Beside an ordinary one, which it must not spoil; of one token alone every map is flat."""
    maps = torch.rand(1, 64, 6)
    maps[..., 1:] = maps[..., 1:2]
    maps[..., 4] += torch.rand(1, 64)
    maps[0, :, 1:4] = 0.3
    alone = maps[..., 1:2].expand(-1, -1, 2).clone().requires_grad_()
    assert tome_binding.entropy_loss(alone, [1], 1).item() == pytest.approx(tome_binding.uniform_entropy(64, 1), abs=1e-4)
    maps.requires_grad_()
    loss = tome_binding.entropy_loss(torch.cat([maps.detach(), torch.full_like(maps, 0.3)]).requires_grad_(), [2, 4], 5)
    assert loss.isfinite().all() and loss[1].item() == pytest.approx(tome_binding.uniform_entropy(64, 2), abs=1e-3)
    assert torch.autograd.grad(tome_binding.entropy_loss(alone, [1], 1).sum(), alone)[0].abs().max() == 0
    out, _ = run(tome_binding.Config(objects=(((1,), ()),), length=1, attention_steps=1))
    assert out.isfinite().all()


def test_descent_on_the_entropy_makes_a_map_compact():
    logits = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = []
    for _ in range(30):
        loss = tome_binding.entropy_loss(logits.softmax(-1), [2], 3)
        losses.append(loss.item())
        logits = (logits - 0.02 * torch.autograd.grad(loss.sum(), logits)[0]).detach().requires_grad_()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01


def test_without_steps_only_the_text_is_merged():
    """Both losses off: the pipeline given the merged embedding does the same."""
    family = FAMILIES["unet"]
    config = tome_binding.Config(objects=OBJECTS, token_steps=0, attention_steps=0)
    merged, _ = run(config)
    pipe = family.pipe()
    forward = pipe.unet.forward

    def with_merged(sample, t, encoder_hidden_states, **kwargs):
        uncond, cond = encoder_hidden_states.chunk(2)
        return forward(sample, t, torch.cat([uncond, tome_binding.merge_tokens(cond, OBJECTS)]), **kwargs)
    pipe.unet.forward = with_merged
    assert torch.equal(family.run(pipe), merged)


def test_each_part_changes_the_result_and_is_counted():
    off = dict(objects=OBJECTS, token_steps=0, attention_steps=0)
    base, report = run(tome_binding.Config(**off))
    assert "extra_calls" not in report and report["bound"] == 2 * 4
    anchored = dict(anchors=FULL.anchors, token_rate=10.0)
    for more, calls in ((dict(attention_steps=2, attention_updates=(3, 3), thresholds=(-9e9,)), 2 * 3),
                        (anchored | dict(token_steps=2), 2 * 2 * (1 + 3 + 1)), (dict(simplified=PHRASES[2], length=3), None)):
        objects = OBJECTS if more.get("length") is None else (((2,), (1,)),)
        out, report = run(tome_binding.Config(**off | more | dict(objects=objects)))
        assert report.get("extra_calls") == calls
        assert not torch.equal(out, base)


def test_a_tuned_token_does_more_of_what_its_phrase_does():
    family, seen = FAMILIES["unet"], []
    pipe = family.pipe()
    with tome_binding.apply(pipe, tome_binding.Config(anchors=(PHRASES[0],), token_rate=1.0, token_updates=5,
                                                      attention_steps=0)) as patch:
        binding = patch.rewrites[0][1].__self__
        predict, mse = binding.predict, torch.nn.functional.mse_loss

        def watch(context, x, text):
            out = predict(context, x, text)
            if context.i == 0:
                seen.append(out.detach())
            return out
        binding.predict = watch
        family.run(pipe, steps=2)
    target, *tries, _ = seen                                               # the last is the anchor's unconditional half
    errors = [mse(each, target).item() for each in tries]
    assert len(errors) == 5 and errors == sorted(errors, reverse=True)


def test_refining_lowers_the_entropy_of_the_first_step():
    family = FAMILIES["unet"]
    pipe = family.pipe()
    config = tome_binding.Config(objects=OBJECTS, length=4, attention_steps=1, attention_updates=(6, 6), rate=0.05,
                                 thresholds=(-9e9,))
    with tome_binding.apply(pipe, config) as patch:
        binding = patch.rewrites[0][1].__self__
        losses, measure = [], tome_binding.entropy_loss
        try:
            tome_binding.entropy_loss = lambda *args: losses.append(measure(*args)) or losses[-1]
            family.run(pipe, steps=2, batch=2)
        finally:
            tome_binding.entropy_loss = measure
        assert binding.maps is None
    assert (losses[-1] < losses[0]).all()


def test_samples_are_refined_apart_and_each_stops_by_itself():
    """Two equal prompts with different noise end as each does alone."""
    family = FAMILIES["unet"]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = PHRASES[:1]
    config = tome_binding.Config(objects=OBJECTS, length=4, attention_steps=2, rate=0.05, thresholds=(18.13,))

    def sample(latents):
        pipe = family.pipe()
        with tome_binding.apply(pipe, config) as patch:
            many = text.expand(len(latents), -1, -1)
            out = pipe(prompt_embeds=many, negative_prompt_embeds=0 * many, latents=latents, num_inference_steps=3,
                       output_type="latent").images
            return out, patch.counts["attention_updates"]
    (both, _), (first, few), (second, many) = sample(noise), sample(noise[:1]), sample(noise[1:])
    assert few == 2 and many > 2
    torch.testing.assert_close(both, torch.cat([first, second]), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler,
                                  DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_the_run_does_not_notice_the_anchors(kind):
    """At a learning rate of 0 anchors change nothing: not the history nor the index of a scheduler, nor the generator."""
    family, results = FAMILIES["unet"], []
    for anchors in ((), tuple(PHRASES[:2])):
        pipe = family.pipe()
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        config = tome_binding.Config(objects=OBJECTS, anchors=anchors, token_rate=0.0, token_steps=3, attention_steps=0)
        state = torch.get_rng_state()
        with tome_binding.apply(pipe, config) as patch:
            results.append((family.run(pipe, steps=5), getattr(pipe.scheduler, "_step_index", None)))
            assert ("token_updates" in patch.report()) == bool(anchors)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, PNDMScheduler])
def test_an_anchor_is_sampled_like_an_image(kind):
    """With the phrase as the prompt the anchor latent is that of an ordinary guided run."""
    family, latents = FAMILIES["unet"], []
    text = PHRASES[:1]

    def sample(config, **more):
        pipe = family.pipe()
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        with tome_binding.apply(pipe, config) as patch:
            pipe(prompt_embeds=text, negative_prompt_embeds=0 * text, height=32, width=32, num_inference_steps=4,
                 generator=torch.Generator().manual_seed(0), guidance_scale=3.0, output_type="latent", **more)
            return patch.rewrites[0][1].__self__.anchors.value if config.objects else None
    off = tome_binding.Config(objects=())
    sample(off, callback_on_step_end=lambda pipe, i, t, given: latents.append(given["latents"]) or given)
    anchor, = sample(tome_binding.Config(anchors=(text[0],), token_rate=0.0, token_steps=4, attention_steps=0))
    torch.testing.assert_close(anchor, latents[3], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_guidance_of_an_anchor(reverse):
    family, seen, steps = FAMILIES["unet"], [], []
    pipe = family.pipe()
    config = tome_binding.Config(anchors=(PHRASES[0],), token_updates=1, token_steps=1, attention_steps=0,
                                 reversed_anchor=reverse)
    with pytest.MonkeyPatch.context() as patcher, tome_binding.apply(pipe, config) as patch:
        binding, step = patch.rewrites[0][1].__self__, DDIMScheduler.step
        predict = binding.predict
        patcher.setattr(binding, "predict", lambda *args: seen.append(predict(*args)) or seen[-1])
        patcher.setattr(DDIMScheduler, "step", lambda self, *args, **kwargs: steps.append(args[0]) or step(
            self, *args, **kwargs))
        family.run(pipe, steps=1, guidance=3.0)
    phrase, _, null = seen
    assert torch.equal(steps[0], null + (-3.0 if reverse else 3.0) * (phrase - null))


def test_only_the_merged_rows_are_tuned():
    pipe, rows = FAMILIES["unet"].pipe(), []
    config = tome_binding.Config(objects=OBJECTS, anchors=tuple(PHRASES[:2]), token_rate=10.0, attention_steps=0)
    with tome_binding.apply(pipe, config) as patch:
        pipe.unet.down_blocks[0].register_forward_pre_hook(lambda _, args, kwargs: rows.append(kwargs["encoder_hidden_states"]),
                                            with_kwargs=True)
        given = FAMILIES["unet"].run(pipe, steps=2) is not None and rows[-1][1]
        assert patch.report()["token_updates"] == 2 * 2 * 3
    merged = tome_binding.merge_tokens(text(1, 0), OBJECTS)[0]
    changed = (given != merged).any(1).nonzero()[:, 0].tolist()
    assert changed == [2, 4]


def test_on_sdxl_the_extra_calls_have_no_pooled_text():
    family, pooled = FAMILIES["sdxl"], []
    pipe = family.pipe()
    pipe.unet.add_embedding.register_forward_pre_hook(lambda _, args: pooled.append(args[0][:, :WIDTH]))
    with tome_binding.apply(pipe, FULL) as patch:
        out = family.run(pipe)
        report = patch.report()
        attn = pipe.unet.up_blocks[0].attentions[1].transformer_blocks[1].attn2
        assert hasattr(attn, "_patch_site")
    empty = [not part.any() for part in pooled]
    assert empty.count(True) == report["extra_calls"] > 0 and empty.count(False) == 4
    assert out.isfinite().all() and not torch.equal(out, family.run(family.pipe()))


def test_residuals_of_a_controlnet_reach_the_extra_calls():
    """Its conditional half, also from a tuple of them."""
    family = FAMILIES["unet"]
    pipe, plain, calls = family.pipe(), family.pipe().unet, []
    sizes = [(32, 16)] * 3 + [(32, 8)] * 3 + [(32, 4)] + [(64, 4)] * 2
    down, mid = [torch.randn(2, channels, side, side) for channels, side in sizes], torch.randn(2, 64, 4, 4)
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {
        "down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}), with_kwargs=True)
    with tome_binding.apply(pipe, FULL) as patch:
        binding = patch.rewrites[0][1].__self__
        predict = binding.predict
        binding.predict = lambda context, x, text: calls.append(
            (x.detach(), context.inputs["timestep"], text.detach().clone(), predict(context, x, text))) or calls[-1][-1]
        family.run(pipe, steps=1)
    for x, t, words, out in calls:
        expected = plain(x, t, words, down_block_additional_residuals=[each[1:] for each in down],
                         mid_block_additional_residual=mid[1:]).sample
        torch.testing.assert_close(out.detach(), expected)


def test_it_stacks_with_nothing():
    pipe = FAMILIES["unet"].pipe()
    for first, second in ((tome, tome_binding), (tome_binding, tome)):
        with first.apply(pipe), pytest.raises(ValueError, match="cannot stack: tome_binding leaves room for nobody else"):
            second.apply(pipe)


def test_positions_behind_the_prompt_are_refused():
    with pytest.raises(ValueError, match="behind the 4 tokens"):
        run(tome_binding.Config(objects=(((7,), ()),)))
    with pytest.raises(ValueError, match="pipeline"):
        tome_binding.apply(FAMILIES["unet"].pipe().unet)


def test_maps_are_read_where_the_attention_is():
    """What `look` keeps is the map of the attention it stands around."""
    pipe = FAMILIES["unet"].pipe()
    attn = pipe.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    with tome_binding.apply(pipe) as patch:
        assert hasattr(attn, "_patch_site")
        binding = patch.rewrites[0][1].__self__
        x, text = torch.randn(1, 64, attn.to_q.in_features), torch.randn(1, WORDS, WIDTH)
        binding.maps = []
        attn(x, encoder_hidden_states=text)
        q, k = (p(t).unflatten(2, (attn.heads, -1)).transpose(1, 2) for p, t in ((attn.to_q, x), (attn.to_k, text)))
        torch.testing.assert_close(binding.maps[0], mean_map(q, k))


@pytest.mark.parametrize("wrong, named", [
    ({"objects": (((), (1,)),)}, "needs a noun"), ({"objects": (((0,), (1,)),)}, "positions from 1"),
    ({"anchors": ("a", "b")}, "2 for 1 objects"), ({"token_steps": -1}, "token_steps=-1"),
    ({"attention_updates": (0, 4)}, "attention_updates="), ({"simplified": "a ball"}, "simplified: .* length")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        tome_binding.Config(**wrong)
