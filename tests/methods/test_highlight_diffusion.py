import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

import methods
from accel_tools.measure.macs import count_macs
from methods import highlight_diffusion as hd
from methods import ocd
from methods._core.denoiser import describe

WORDS = (1, 2, 3, 4)                                            # the families get embeddings, whose words are not known


@pytest.mark.parametrize("check, case", contract.cases(hd, contract.engaging(hd)), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("steps, partial, expected", [(10, (0,), list(range(10))), (7, (2,), [0, 3, 6]),
                                                      (10, (1, 3), [0, 2, 4, 6]), (8, (3, 0), [0, 4, 5, 6, 7])])
def test_full_steps(steps, partial, expected):
    assert hd.full_steps(steps, partial) == expected


def maps_of(word, tokens=4):
    """Attention (1, T, 8, 8): the first token everywhere, one word where given, the rest evenly small."""
    maps = torch.full((1, tokens, 8, 8), 0.01)
    maps[:, 0] = 0.9
    maps[0, 2][word] = 0.5
    return maps


SECOND = torch.tensor([[False, True, True, False]])


def test_highlight_worked_by_hand():
    mask = hd.highlight(maps_of((slice(2, 4), slice(5, 6))), SECOND, (8, 8), 0.5, 0)
    assert mask.nonzero()[:, 1:].tolist() == [[2, 5], [3, 5]]
    wide = hd.highlight(maps_of((slice(2, 4), slice(5, 6))), SECOND, (8, 8), 0.5, 1)
    assert wide.nonzero()[:, 1:].tolist() == [[y, x] for y in range(1, 5) for x in range(4, 7)]
    fine = hd.highlight(maps_of((slice(2, 4), slice(5, 6))), SECOND, (16, 16), 0.5, 0)
    assert fine[0, 4:8, 10:12].all() and fine.sum() < 4 * 4
    assert not hd.highlight(maps_of((slice(2, 4), slice(5, 6))), ~SECOND, (8, 8), 0.5, 0).any()     # other tokens are even


def test_moving_the_map_moves_the_mask():
    here, there = (hd.highlight(maps_of((slice(y, y + 2), slice(3, 5))), SECOND, (8, 8), 0.5, 1) for y in (2, 4))
    assert torch.equal(here.roll(2, 1), there) and here.any()


def test_an_even_map_highlights_nothing():
    assert not hd.highlight(torch.full((1, 4, 8, 8), 0.25), SECOND, (8, 8), 0.0, 2).any()


def fixed(monkeypatch, mask):
    monkeypatch.setattr(hd, "highlight", lambda maps, *_: mask.expand(len(maps), -1, -1))


def outputs(name, config, steps=4, **setting):
    """Inputs and outputs of every call of the model in one patched run."""
    pipe, calls = FAMILIES[name].pipe(), []
    model = pipe.unet if name == "unet" else pipe.transformer
    names = ["sample" if name == "unet" else "hidden_states", "timestep"]

    def note(_, args, kwargs, out):
        calls.append((dict(zip(names, args, strict=False)) | kwargs, out[0] if isinstance(out, tuple) else out.sample))

    with hd.apply(pipe, config) as patch:
        model.register_forward_hook(note, with_kwargs=True)
        FAMILIES[name].run(pipe, steps=steps, **setting)
        return calls, patch.report()


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_a_partial_step_computes_the_box_and_keeps_the_rest(name, monkeypatch):
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 5:8, 6:7] = True
    fixed(monkeypatch, mask)
    calls, report = outputs(name, hd.Config(partial=(2,), margin=1, words=WORDS))
    assert report["partial"] == 2                                               # steps 1 and 2
    rows, columns = slice(4, 12), slice(4, 8)                                   # 4:9 and 5:8, on multiples of 4
    if name == "pixart":
        rows = slice(4, 10)                                                     # on multiples of 2: 4:9 and 5:8
    twin = FAMILIES[name].pipe()
    model = twin.unet if name == "unet" else twin.transformer
    latent = "sample" if name == "unet" else "hidden_states"
    whole = calls[0][1]
    for inputs, out in calls[1:3]:
        assert torch.equal(out[:, :, ~mask[0]], whole[:, :, ~mask[0]])
        if name == "pixart":                                                    # each token at its place in the whole image
            tokens = FAMILIES[name].pipe().transformer.pos_embed(inputs[latent]).unflatten(1, (8, 8))
            model.pos_embed.forward = lambda _, tokens=tokens: tokens[:, 2:5, 2:4].flatten(1, 2)
        part = model(**{**inputs, latent: inputs[latent][..., rows, columns], "return_dict": False})[0]
        inside = mask[0, rows, columns]
        torch.testing.assert_close(out[..., rows, columns][:, :, inside], part[:, :, inside], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", [torch.zeros(1, 16, 16, dtype=torch.bool), torch.ones(1, 16, 16, dtype=torch.bool)])
def test_no_highlight_and_a_highlight_of_everything_are_full_steps(mask, monkeypatch):
    fixed(monkeypatch, mask)
    family = FAMILIES["unet"]
    pipe = family.pipe()
    with hd.apply(pipe, hd.Config(words=WORDS)) as patch:
        assert torch.equal(family.run(pipe, steps=4), family.run(family.pipe(), steps=4))
        assert patch.report()["state"] == "no gain" and "no region smaller" in patch.report()["reason"]


def test_the_maps_are_those_of_the_conditional_branch_at_the_level(monkeypatch):
    seen = []
    real = hd.highlight
    monkeypatch.setattr(hd, "highlight", lambda maps, *rest: seen.append(maps) or real(maps, *rest))
    pipe, ins = FAMILIES["unet"].pipe(), []
    blocks = [block for block in describe(pipe.unet).blocks if block.level == 1]

    def note(module, args, kwargs, out):
        ins.append((module, args[0], kwargs["encoder_hidden_states"]))

    with hd.apply(pipe, hd.Config(partial=(1,), words=WORDS)):
        for block in blocks:
            block.cross.register_forward_hook(note, with_kwargs=True)
        FAMILIES["unet"].run(pipe, steps=2)
    (maps,) = seen
    expected = torch.zeros(5, 64)
    for attn, x, text in ins[:len(blocks)]:
        q, k = attn.to_q(x[1]).unflatten(1, (attn.heads, -1)), attn.to_k(text[1]).unflatten(1, (attn.heads, -1))
        for h in range(attn.heads):
            expected += (q[:, h] @ k[:, h].T * q.shape[2] ** -0.5).softmax(-1).T / attn.heads / len(blocks)
    for half in maps:                                                           # both branches get the conditional one's
        torch.testing.assert_close(half, expected.view(5, 8, 8), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_a_partial_step_costs_its_share_of_the_image(name, monkeypatch):
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 4:12, 4:12] = True
    fixed(monkeypatch, mask)
    setting, costs = dict(partial=(1,), margin=0), []
    for config in (hd.Config(**setting), hd.Config(**setting, words=WORDS)):    # without words both steps are full
        pipe = FAMILIES[name].pipe()
        with hd.apply(pipe, config):
            costs.append(count_macs(lambda pipe=pipe: FAMILIES[name].run(pipe, steps=2)))
    full = costs[0] / 2
    assert 1 / 4 ** 2 < (costs[1] - full) / full < 1.1 / 4                      # attention 1 / 16, all else 1 / 4


def emoji(prompt, config, steps=20, **setting):
    """The report of one run of the bundled UNet, and the words of each mask that was made."""
    pipe, words, real = methods.tiny("unet"), [], hd.highlight
    pipe.set_progress_bar_config(disable=True)
    setting = dict(guidance_scale=3.0, output_type="latent", generator=torch.Generator().manual_seed(0)) | setting
    with pytest.MonkeyPatch.context() as patched, hd.apply(pipe, config) as patch:
        patched.setattr(hd, "highlight", lambda maps, which, *rest: words.append(which) or real(maps, which, *rest))
        pipe(prompt, num_inference_steps=steps, **setting)
        report = patch.report()
    assert "_patch_site" not in vars(pipe.text_encoder) and "forward" not in vars(pipe.text_encoder)
    return report, words


SCALED = hd.Config(threshold=0.8, widen=0, margin=1)            # the default margins are for latents four times as large


def test_an_emoji_fills_the_image_so_that_only_a_tight_mask_makes_partial_steps():
    report, words = emoji("green apple", hd.Config())
    assert report["state"] == "no gain" and "partial" not in report and words
    report, _ = emoji("green apple", SCALED)
    assert report["state"] == "engaged" and report["partial"] > 5


def test_words_are_the_tokens_of_the_prompt_that_are_not_special():
    prompts, tokenizer = ["green apple", "dog"], methods.tiny("unet").tokenizer
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    expected = torch.zeros(2, tokenizer.model_max_length, dtype=torch.bool)
    for row, length in zip(expected, lengths, strict=True):
        row[1:length - 1] = True                                                # between the first token and the end
    for setting in (dict(negative_prompt=["blue whale, cow, crab"] * 2), dict(guidance_scale=1.0)):
        _, (words, *_) = emoji(prompts, SCALED, 4, **setting, num_images_per_prompt=2)
        assert torch.equal(words, expected.repeat_interleave(2, 0))


def test_without_known_words_all_steps_are_full():
    pipe = methods.tiny("unet")
    embeds, _ = pipe.encode_prompt(["green apple"], "cpu", 1, False)
    for prompt, setting in (("", {}), (["dog", ""], {}), (None, dict(prompt_embeds=embeds, negative_prompt="cow"))):
        report, words = emoji(prompt, SCALED, 4, **setting)
        assert report["state"] == "no gain" and not words
    report, words = emoji(None, hd.Config(words=(2,)), 4, prompt_embeds=embeds)
    assert words[0].nonzero().tolist() == [[0, 2]]


def test_words_encoded_beforehand_are_of_no_image():
    """Two prompts are encoded, then drawn from their embeddings; and a second pipeline reads with the same encoder."""
    pipe = methods.tiny("unet")
    other = methods.tiny("unet")
    other.text_encoder = pipe.text_encoder
    with hd.apply(pipe, SCALED) as patch, hd.apply(other, SCALED) as second:
        embeds = [pipe.encode_prompt(word, "cpu", 1, True)[:2] for word in ("red apple", "dog")]
        for cond, null in embeds:
            pipe(prompt_embeds=cond, negative_prompt_embeds=null, num_inference_steps=4, output_type="latent")
            assert patch.report()["state"] == "no gain" and "no words are known" in patch.report()["reason"]
        pipe("green apple", num_inference_steps=20, output_type="latent", generator=torch.Generator().manual_seed(0))
        assert patch.report()["state"] == "engaged"
        assert second.report()["state"] == "idle"
    assert "_patch_site" not in vars(pipe.text_encoder)


def test_words_of_another_run_are_forgotten():
    pipe, words, real = methods.tiny("unet"), [], hd.highlight
    pipe.set_progress_bar_config(disable=True)
    setting = dict(num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    embeds, _ = pipe.encode_prompt("dog", "cpu", 1, False)
    with pytest.MonkeyPatch.context() as patched, hd.apply(pipe, SCALED):
        patched.setattr(hd, "highlight", lambda maps, which, *rest: words.append(which) or real(maps, which, *rest))
        pipe.encode_prompt("green apple", "cpu", 1, False)                      # and then something stopped it
        pipe("dog", **setting)
        assert words[0].sum() == len(pipe.tokenizer("dog").input_ids) - 2
        words.clear()
        pipe(prompt_embeds=embeds, **setting)
        assert not words


def test_a_bare_model_and_another_crop_are_refused():
    pipe = FAMILIES["unet"].pipe()
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        hd.apply(pipe.unet)
    with ocd.apply(pipe), pytest.raises(ValueError, match="cannot stack: both cut the frame"):
        hd.apply(pipe)


@pytest.mark.parametrize("wrong, named", [({"partial": ()}, "partial="), ({"threshold": 1.5}, "threshold=1.5"),
                                          ({"margin": -1}, "margin=-1"), ({"words": (-1,)}, "words=")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        hd.Config(**wrong)
