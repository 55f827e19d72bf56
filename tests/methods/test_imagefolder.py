import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contracts import module
from drawn import digits

import methods
from methods import imagefolder

TINY = imagefolder.TINY
RANDOM = torch.Generator().manual_seed(4)
IMAGES = torch.rand(8, 3, 8, 8, generator=RANDOM) * 2 - 1
FEATURES = torch.randn(8, 16, generator=RANDOM)
LABELS = torch.arange(8) % (TINY.classes + 1)


def run(model, random):
    images = IMAGES.to(model.code.weight.dtype)
    tokens = imagefolder.generate(model, LABELS, random)
    return {"z": torch.cat([each.z for each in model.encode(images)], 1), "tokens": torch.cat(tokens, 1),
            "images": model.decode(tokens)}


def loss(model, stage, random):
    return imagefolder.loss(model, stage, IMAGES, LABELS if stage == "generator" else FEATURES, random)["loss"]


WORK = module.Work(run, {"z": (8, 8, 2, 2), "tokens": (8, 5, 2), "images": (8, 3, 8, 8)}, loss,
                   wrong=({"patch": 3}, {"heads": 3}, {"generator_heads": 3}, {"scales": (2,)}, {"scales": (2, 1)},
                          {"first": 3}, {"drop": 1.0}, {"empty": 1.0}, {"top_p": 0.0}, {"branches": 0}, {"semantic": -1.0}))


@pytest.mark.parametrize("check, case", module.cases(imagefolder, WORK), ids=module.name)
def test_contract(check, case):
    check(case)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(**more):
    """A network whose generator does not start at zero."""
    model = imagefolder.build(replace(TINY, **more)).double()
    random = generator(1)
    for weight in model.generator.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=random)
    return model


def tokens_of(model, images=None):
    coded = model.encode(IMAGES.double() if images is None else images)
    return [torch.stack(each, -1) for each in zip(*(each.index for each in coded), strict=True)]


# ---- the tokenizer -----------------------------------------------------------------------------------------------------

def test_folding_does_not_lengthen_the_sequence():
    scales = imagefolder.Config().scales
    places = imagefolder.scale_of(scales)
    assert len(places) == 286 and [int((places < s).sum()) for s in range(10)] == [0, 1, 2, 6, 15, 24, 40, 65, 101, 165]
    for branches in (1, 2, 3):
        model = double(branches=branches)
        tokens = tokens_of(model)
        assert [each.shape for each in tokens] == [(8, 1, branches), (8, 4, branches)]
        logits = model.generator(LABELS, model.inputs(tokens))
        assert logits.shape == (8, 5, branches, 6)


def test_tokens_decode_to_what_was_encoded():
    model = double(scales=(1, 2, 3), first=2)
    z = torch.cat([each.z for each in model.encode(IMAGES.double())], 1)
    torch.testing.assert_close(model.summed(tokens_of(model))[-1], z)
    torch.testing.assert_close(model.decode(tokens_of(model)), model.paint(z))
    torch.testing.assert_close(model.decode(tokens_of(model)[:2]), model.paint(model.summed(tokens_of(model))[1]))


def test_branches_are_apart():
    model = double()
    tokens = tokens_of(model)
    changed = [torch.stack([(each[..., 0] + 1) % 6, each[..., 1]], -1) for each in tokens]
    before, after = model.summed(tokens)[-1], model.summed(changed)[-1]
    assert torch.equal(before[:, 4:], after[:, 4:]) and not torch.allclose(before[:, :4], after[:, :4])
    model.quantisers[1].codes.data *= 2
    assert torch.equal(model.summed(tokens)[-1][:, :4], before[:, :4])


def test_latents_of_both_branches_lie_over_each_other():
    """Each has the positions of the image, shrunk to its grid, and differs by its level alone."""
    model, seen = double(scales=(1, 2)), []
    model.latents.data.zero_()
    model.encoder[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.maps(IMAGES.double())
    first, second = seen[0][:, 4:8], seen[0][:, 8:]
    torch.testing.assert_close(first - model.levels[1], second - model.levels[2])
    torch.testing.assert_close(first[0] - model.levels[1], model.places)         # a grid of the image's own size


def test_the_contrast_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    # products: 3 and 1, 2 and 2
    both = [-math.log(math.exp(3) / (math.exp(3) + math.exp(1))), math.log(2)]
    back = [-math.log(math.exp(3) / (math.exp(3) + math.exp(2))), -math.log(math.exp(2) / (math.exp(1) + math.exp(2)))]
    assert float(imagefolder.contrast(a, b, 1.0)) == pytest.approx((sum(both) + sum(back)) / 4)
    assert float(imagefolder.contrast(a, b, 0.0)) == pytest.approx(math.log(2))


def test_the_teacher_reaches_the_last_branch_alone():
    model = double(drop=0.0)
    found = imagefolder.loss(model, "tokenizer", IMAGES.double(), FEATURES.double(), generator())
    rest = torch.autograd.grad(found["contrast"], [*model.quantisers[0].parameters(), *model.quantisers[1].parameters()],
                               allow_unused=True, retain_graph=True)
    assert all(each is None for each in rest)                                    # straight through: not even its codebook
    z = [each.z for each in model.encode(IMAGES.double())]
    expected = imagefolder.contrast(z[1].mean((2, 3)), model.code(FEATURES.double()), 1.0)
    torch.testing.assert_close(found["contrast"], expected)
    torch.testing.assert_close(found["loss"], found["error"] + found["quantised"] + 0.1 * expected)
    torch.testing.assert_close(found["error"], (model.paint(torch.cat(z, 1)) - IMAGES.double()).square().mean())


def test_some_images_keep_their_first_scales_in_both_branches(monkeypatch):
    model, seen = double(scales=(1, 1, 2), first=2, drop=0.5), []
    for quantiser in model.quantisers:
        quantiser.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    random = generator()
    for _ in range(30):
        imagefolder.loss(model, "tokenizer", IMAGES.double(), FEATURES.double(), random)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    kept = torch.stack(seen[::2])
    assert (kept[:, 4:] == 3).all() and set(kept[:, :4].flatten().tolist()) == {2, 3}


# ---- the generator -----------------------------------------------------------------------------------------------------

def test_a_scale_does_not_see_itself_or_what_comes_after():
    model = double(scales=(1, 2, 3), first=1)
    tokens = tokens_of(model)
    before = model.generator(LABELS, model.inputs(tokens))
    tokens[1] = (tokens[1] + 1) % 6
    after = model.generator(LABELS, model.inputs(tokens))
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_the_loss_of_the_generator_by_hand():
    model = double(empty=0.0, hide=0.0)
    found = imagefolder.loss(model, "generator", IMAGES.double(), LABELS, generator())["loss"]
    tokens, total = tokens_of(model), []
    logits = model.generator(LABELS, model.inputs(tokens)).log_softmax(-1)
    flat = torch.cat(tokens, 1)
    for branch in range(2):
        total.append(F.nll_loss(logits[:, :, branch].flatten(0, 1), flat[..., branch].flatten()))
    torch.testing.assert_close(found, sum(total) / 2)
    assert all(weight.grad is None for weight in model.code.parameters())
    nothing = imagefolder.build(replace(TINY, hide=0.0))                         # says the same of all codes at first
    first = imagefolder.loss(nothing, "generator", IMAGES, LABELS, generator())["loss"]
    assert float(first.detach()) == pytest.approx(math.log(6), abs=1e-5)


def test_what_is_blanked_is_not_seen():
    model, blank = double(), torch.zeros(8, 4, dtype=torch.bool)
    inputs = model.inputs(tokens_of(model))
    blank[:, 2] = True
    other = inputs.clone()
    other[:, 2] += 1
    assert torch.equal(model.generator(LABELS, inputs, blank), model.generator(LABELS, other, blank))
    assert not torch.allclose(model.generator(LABELS, inputs, blank), model.generator(LABELS, inputs))


def test_guidance_rises_with_the_scale(monkeypatch):
    """None at the first scale, whole at the last; branches are drawn each by itself."""
    model, seen = double(scales=(1, 2, 3), first=1), []
    monkeypatch.setattr(imagefolder, "nucleus", lambda logits, *_: seen.append(logits) or logits.softmax(-1))
    tokens = imagefolder.generate(model, LABELS, generator(), guidance=2.0)
    inputs = model.inputs(tokens)
    cond, uncond = (model.generator(labels, inputs) for labels in (LABELS, torch.full_like(LABELS, 4)))
    for s, (part, t) in enumerate(zip(seen, (0.0, 1.0, 2.0), strict=True)):
        at = imagefolder.scale_of((1, 2, 3)) == s
        torch.testing.assert_close(part, ((1 + t) * cond - t * uncond)[:, at].float())


def test_greedy_tokens_are_the_likeliest():
    model = double(top_k=1)
    tokens = imagefolder.generate(model, LABELS, generator(), guidance=0.0)
    again = imagefolder.generate(model, LABELS, generator(9), guidance=0.0)
    logits = model.generator(LABELS, model.inputs(tokens))
    assert all(torch.equal(a, b) for a, b in zip(tokens, again, strict=True))
    assert torch.equal(torch.cat(tokens, 1), logits.argmax(-1))


def test_bad_inputs_are_named():
    model = imagefolder.build(TINY)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4"):
        imagefolder.generate(model, torch.tensor([5]), generator())
    with pytest.raises(ValueError, match="stage='images' must be one of tokenizer, generator"):
        imagefolder.loss(model, "images", IMAGES, LABELS, generator())


# ---- the bundled weights -----------------------------------------------------------------------------------------------

def test_what_the_paper_says_holds_on_the_card():
    """Two branches rebuild better than one at as many places; the teacher is read in its branch, and without it in neither."""
    found = methods.weights("imagefolder").with_suffix(".json")
    found = json.loads(found.read_text())["metrics"]
    one, untaught = found["rivals"]["one branch"], found["rivals"]["no teacher"]
    assert found["mse"] < one["mse"] and found["positions"] == one["positions"] == untaught["positions"] == 21
    assert found["mse_by_scale"] == sorted(found["mse_by_scale"], reverse=True)
    (detail, semantic), other = found["probe_by_branch"], untaught["probe_by_branch"]
    assert semantic > detail + 0.2 and abs(other[1] - other[0]) < 0.1


@torch.no_grad()
def test_the_bundled_tokenizer_rebuilds_digits():
    model, (images, _) = imagefolder.build(imagefolder.TRAINED["imagefolder"]), digits()
    imagefolder.load(model, methods.weights("imagefolder"))
    errors = [float((model.decode(tokens_of(model, images)[:n]) - images).square().mean()) for n in (1, 2, 3)]
    assert errors[2] < errors[0] and errors[2] < 0.6 * float(images.var())
    drawn = model.decode(imagefolder.generate(model, torch.arange(40) % 10, generator(8)))
    assert drawn.shape == (40, 1, 32, 32) and 0.3 < float(drawn.std() / images.std()) < 1.5
