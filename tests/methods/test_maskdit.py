from dataclasses import replace

import pytest
import torch
from contracts import module
from drawn import digits
from torch import nn

import methods
from accel_tools.measure.macs import count_macs
from methods import maskdit
from methods._core.masking import random_mask
from methods._core.noise import Noisy
from methods._core.parts import patchify

TINY = maskdit.TINY
IMAGES = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
LABELS = torch.arange(8) % (TINY.classes + 1)


def run(model, random):
    return {"images": maskdit.generate(model, LABELS, random, steps=3),
            "said": model(IMAGES.to(model.mask.dtype), torch.zeros(8), LABELS)}


WORK = module.Work(run, {"images": (8, 2, 8, 8), "said": (8, 2, 8, 8)},
                   lambda model, stage, random: maskdit.loss(model, stage, IMAGES, LABELS, random)["loss"],
                   wrong=({"patch": 3}, {"heads": 3}, {"decoder_heads": 3}, {"ratio": 1.0}, {"ratio": 0.95}, {"layers": 0},
                          {"drop": -0.1}, {"width": 18, "heads": 2}, {"decoder_layers": 0}))


@pytest.mark.parametrize("check, case", module.cases(maskdit, WORK), ids=module.name)
def test_contract(check, case):
    check(case)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def started(dtype=torch.float64, **more):
    """A network none of whose layers is zero."""
    model = maskdit.build(replace(TINY, **more))
    random = generator(1)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=random)
    return model.to(dtype)


def said_by(model, monkeypatch):
    """What the network says in `loss`, with its gradient."""
    kept, forward = [], maskdit.MaskDiT.forward

    def remembered(self, *args):
        kept.append(forward(self, *args))
        kept[-1].retain_grad()
        return kept[-1]
    monkeypatch.setattr(maskdit.MaskDiT, "forward", remembered)
    return kept


# ---- the mask ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio, kept", [(0.75, 16), (0.5, 32), (0.3, 44), (0.0, 64)])
def test_the_encoder_sees_what_stays_and_the_decoder_all(ratio, kept):
    model, seen = maskdit.build(replace(TINY, size=16, ratio=ratio)), []
    for chain in (model.blocks, model.decoder):
        chain[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    maskdit.loss(model, "masked", torch.zeros(2, 2, 16, 16), LABELS[:2], generator())
    assert seen == [kept, 64]
    maskdit.generate(model.train(), LABELS[:2], generator(), steps=1)
    assert seen[2:] == [64, 64]


def test_tokens_go_back_to_their_places_and_mask_tokens_stand_in_the_gaps():
    """With an encoder and a decoder that do nothing the head gets each kept token in its own place."""
    model, got = started(), []
    model.blocks, model.decoder = nn.ModuleList(), nn.ModuleList()
    model.head.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    masking, t = random_mask(8, 16, 0.5, generator()), torch.zeros(8, dtype=torch.float64)
    model(IMAGES.double(), t, LABELS, masking)
    model(IMAGES.double(), t, LABELS)
    for row, whole, hole in zip(*got, masking.masked, strict=True):
        torch.testing.assert_close(row[~hole], whole[~hole])
        torch.testing.assert_close(row[hole], (model.mask + model.decoder_places)[hole])


def test_without_masks_there_is_nothing_of_them():
    model = started(ratio=0.0)
    for stage in maskdit.STAGES:
        maskdit.loss(model, stage, IMAGES.double(), LABELS, generator())["dsm"].backward()
    assert model.mask.grad is None or not model.mask.grad.any()
    masked, whole = (maskdit.loss(model, stage, IMAGES.double(), LABELS, generator())["dsm"] for stage in maskdit.STAGES)
    torch.testing.assert_close(masked, whole)


def test_each_loss_moves_what_it_looks_at(monkeypatch):
    model = started()
    kept = said_by(model, monkeypatch)
    for name in ("dsm", "mae"):
        maskdit.loss(model, "masked", IMAGES.double(), LABELS, generator(3))[name].backward()
    masking_random = generator(3)
    model.noising.sample(IMAGES.double(), masking_random), torch.rand(8, generator=masking_random)
    masked = random_mask(8, 16, 0.5, masking_random).masked
    for said, moved in zip(kept, (~masked, masked), strict=True):
        assert torch.equal(patchify(said.grad, 2).abs().sum(-1) > 0, moved)


# ---- the losses --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", maskdit.STAGES)
def test_the_losses_of_an_untrained_network(stage):
    """It says 0, so D = c_skip y, worked here with the weight of EDM."""
    model, random = maskdit.build(TINY).double(), generator(5)
    found = maskdit.loss(model, stage, IMAGES.double(), LABELS, random)
    random.manual_seed(5)
    noisy = model.noising.sample(IMAGES.double(), random)
    torch.rand(8, generator=random)
    sigma = (4 * noisy.t.double()).exp().view(-1, 1, 1, 1)
    y, skip = IMAGES + sigma * noisy.eps, 0.25 / (sigma ** 2 + 0.25)
    weight = (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2
    error = patchify(weight * (skip * y - IMAGES) ** 2, 2).mean(-1)
    masked = random_mask(8, 16, 0.5 if stage == "masked" else 0.0, random).masked
    torch.testing.assert_close(found["dsm"], error[~masked].view(8, -1).mean())
    if stage == "masked":
        noise = patchify(y, 2)
        target = (noise - noise.mean(-1, keepdim=True)) / (noise.var(-1, keepdim=True) + 1e-6) ** 0.5
        rebuilt = (patchify(skip * y, 2) - target).square().mean(-1)[masked].mean()
        torch.testing.assert_close(found["mae"], rebuilt)
        torch.testing.assert_close(found["loss"], found["dsm"] + 0.1 * found["mae"])
    else:
        assert torch.equal(found["loss"], found["dsm"])


def test_the_preconditioning_by_hand():
    model = maskdit.build(TINY).double()
    torch.testing.assert_close(model.denoise(IMAGES.double(), 0.5, LABELS), IMAGES.double() / 2)
    torch.testing.assert_close(model.denoise(IMAGES.double(), 2.0, LABELS), IMAGES.double() * 0.25 / 4.25)
    half = torch.full((1,), 0.5, dtype=torch.float64)
    noisy = Noisy(*[half] * 5)._replace(t=half.log() / 4)
    moved = model.noising.denoised(half * 0 + 1, noisy) - model.noising.denoised(half * 0, noisy)
    assert float(1 / moved ** 2) == pytest.approx(8)                            # 1 / c_out^2, the weight at sigma_data


def test_a_patch_is_standardised_with_the_unbiased_deviation():
    found = maskdit.standardised(torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0]]))
    torch.testing.assert_close(found[0], torch.tensor([-3.0, -1.0, 1.0, 3.0]) / (20 / 3) ** 0.5)
    assert found[1].tolist() == [0, 0, 0, 0]


def test_no_label_is_no_embedding():
    model, t = started(), torch.zeros(2, dtype=torch.float64)
    none, first = model(IMAGES[:1].double(), t[:1], torch.tensor([4])), model(IMAGES[:1].double(), t[:1], torch.tensor([1]))
    model.label.weight.data.zero_()
    assert torch.equal(model(IMAGES[:1].double(), t[:1], torch.tensor([1])), none) and not torch.equal(first, none)


# ---- what it costs -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config, ratio", [(TINY, 0.0), (TINY, 0.5), (maskdit.TRAINED["maskdit"], 0.5),
                                           (replace(TINY, ratio=0.0, decoder_layers=0), 0.0)])
def test_computing_is_what_the_closed_form_says(config, ratio):
    model = maskdit.build(config)
    x, masking = torch.zeros(1, config.channels, config.size, config.size), random_mask(1, config.tokens, ratio, generator())
    found = count_macs(lambda: model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long), masking if ratio else None))
    assert found == maskdit.macs(config, ratio)


def test_half_of_the_tokens_make_the_largest_network_about_half_as_dear():
    config = maskdit.Config()
    plain = maskdit.macs(replace(config, ratio=0.0, decoder_layers=0))
    assert plain == pytest.approx(118.6e9, rel=0.01)
    assert maskdit.macs(config, 0.5) / plain == pytest.approx(0.55, abs=0.03)
    assert maskdit.macs(config) / plain > 1                                     # what sampling pays for the decoder


# ---- sampling ----------------------------------------------------------------------------------------------------------

def test_noise_levels():
    found = maskdit.noise_levels(18)
    assert found[0] == pytest.approx(80) and found[17] == pytest.approx(0.002) and found[18] == 0 and len(found) == 19
    assert found == sorted(found, reverse=True)
    assert found[9] == pytest.approx((80 ** (1 / 7) + 9 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)


def test_the_sampler_is_of_second_order():
    """Of data that is normal with deviation 0.5 the denoiser is c_skip y; the exact end is y / sqrt(1 + (sigma / 0.5)^2)."""
    model = maskdit.build(TINY).double()
    y = torch.randn(8, 2, 8, 8, generator=generator(9)).double() * 80
    exact, errors = y / (1 + (80 / 0.5) ** 2) ** 0.5, []
    for steps in (20, 40):
        errors.append(float((maskdit.generate(model, LABELS, generator(9), steps=steps) - exact).abs().max()))
    assert errors[1] < 0.3 * errors[0] < 0.03


@pytest.mark.parametrize("guidance, rows", [(1.0, [8] * 5), (2.0, [16] * 5)])
def test_guidance_doubles_the_rows(guidance, rows):
    model, seen = started(), []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    out = maskdit.generate(model, LABELS, generator(), steps=3, guidance=guidance)
    assert seen == rows and torch.equal(out[4], maskdit.generate(model, LABELS, generator(), steps=3, guidance=1.0)[4])


def test_bad_inputs_are_named():
    model = maskdit.build(TINY)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, 4 for none; these reach from 0 to 5"):
        maskdit.generate(model, torch.tensor([0, 5]), generator())
    with pytest.raises(ValueError, match="steps=0"):
        maskdit.generate(model, LABELS, generator(), steps=0)
    with pytest.raises(ValueError, match="stage='half' must be one of masked, whole"):
        maskdit.loss(model, "half", IMAGES, LABELS, generator())


# ---- the bundled weights -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_bundled_weights_know_digits_from_noise():
    """The error of an untrained network falls to less than 0.5 of it, on digits of another model."""
    images, labels = digits()
    model = maskdit.build(maskdit.TRAINED["maskdit"])
    before = maskdit.loss(model, "whole", images, labels, generator(9))["dsm"]
    maskdit.load(model, methods.weights("maskdit"))
    assert maskdit.loss(model, "whole", images, labels, generator(9))["dsm"] < 0.5 * before
