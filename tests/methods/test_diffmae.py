import json
from dataclasses import replace

import pytest
import torch
from contracts import module
from drawn import digits
from torch import nn

import methods
from accel_tools.measure.macs import count_macs
from methods import diffmae
from methods._core.masking import Masking, random_mask
from methods._core.noise import Noising
from methods._core.parts import patchify

TINY = diffmae.TINY
IMAGES = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
MASKING = random_mask(8, 16, 0.75, torch.Generator().manual_seed(6))


def run(model, random):
    x = IMAGES.to(model.token.dtype)
    seen = model.encode(x, MASKING)
    return {"images": diffmae.inpaint(model, x, MASKING, random, steps=3), "seen": torch.stack(seen),
            "said": model.decode(MASKING.drop(patchify(x, 2)), torch.arange(8), MASKING, seen)}


WORK = module.Work(run, {"images": (8, 2, 8, 8), "seen": (2, 8, 5, 16), "said": (8, 12, 8)},
                   lambda model, stage, random: diffmae.loss(model, stage, IMAGES, random)["loss"],
                   wrong=({"patch": 3}, {"heads": 3}, {"decoder_heads": 3}, {"decoder": "joint"}, {"decoder_layers": 3},
                          {"ratio": 0.0}, {"ratio": 0.99}, {"lowest": 1000}, {"lowest": -1}))


@pytest.mark.parametrize("check, case", module.cases(diffmae, WORK), ids=module.name)
def test_contract(check, case):
    check(case)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(**more):
    return diffmae.build(replace(TINY, **more)).double()


def test_of_196_patches_the_encoder_sees_49_and_a_class_token():
    model, seen = diffmae.build(replace(TINY, size=28)), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.readers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    diffmae.loss(model, "pretrain", torch.zeros(1, 2, 28, 28), generator())
    assert seen == [50, 147]


def test_the_encoder_knows_nothing_of_noise_and_runs_once():
    model, kept = double(), []
    model.blocks[0].register_forward_hook(lambda _, args, out: kept.append(out))
    diffmae.inpaint(model, IMAGES.double(), MASKING, generator(0), steps=5)
    changed = MASKING.fill(MASKING.keep(patchify(IMAGES.double(), 2)), torch.zeros(8).double())
    diffmae.inpaint(model, diffmae.unpatchify(changed, 2, 4), MASKING, generator(1), steps=2)
    assert len(kept) == 2 and torch.equal(*kept)


def test_decoder_blocks_read_the_encoder_backwards():
    model, read, made = double(layers=4, decoder_layers=3), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: made.append(out))
    for reader in model.readers:
        reader.register_forward_pre_hook(lambda _, args: read.append(args[1]))
    diffmae.loss(model, "pretrain", IMAGES.double(), generator())
    assert len(read) == 3 and torch.equal(read[0], model.norm(made[3]))
    assert torch.equal(read[1], made[2]) and torch.equal(read[2], made[1])
    assert len(double(layers=4, decoder_layers=1).encode(IMAGES.double(), MASKING)) == 1


@pytest.mark.parametrize("decoder", ["cross", "cross-self"])
def test_noisy_tokens_see_each_other_in_one_decoder_alone(decoder):
    model, t = double(decoder=decoder), torch.full((8,), 300)
    seen, x = model.encode(IMAGES.double(), MASKING), MASKING.drop(patchify(IMAGES.double(), 2))
    whole = model.decode(x, t, MASKING, seen)
    turned = Masking(torch.cat([MASKING.kept, MASKING.order[:, 4:].flip(1)], 1), 4)
    torch.testing.assert_close(model.decode(x.flip(1), t, turned, seen), whole.flip(1))
    fewer = Masking(MASKING.order[:, :-1], 4)                                    # without the last noisy token
    part = fewer._replace(order=fewer.order)
    assert torch.allclose(model.decode(x[:, :-1], t, part, seen), whole[:, :-1]) == (decoder == "cross")


def test_the_loss_is_that_of_masked_pixels_at_any_level(monkeypatch):
    """With a decoder that says what it is given, the error is that of the noise; at the first level almost none."""
    model = double()
    monkeypatch.setattr(diffmae.DiffMAE, "decode", lambda self, x, t, masking, seen: x)
    random = generator(2)
    found = diffmae.loss(model, "pretrain", IMAGES.double(), random)["loss"]
    random.manual_seed(2)
    masking = random_mask(8, 16, 0.75, random)
    t = ((torch.randperm(8, generator=random) + torch.rand(8, generator=random)) / 8 * 1000).long()
    clean = masking.drop(patchify(IMAGES.double(), 2))
    noisy = Noising(diffmae.schedule()).sample(clean, random, t=t)
    torch.testing.assert_close(found, (noisy.x - clean).square().mean())
    first = Noising(diffmae.schedule()).sample(clean, generator(), t=torch.zeros(8, dtype=torch.long))
    assert float((first.x - clean).square().mean()) == pytest.approx(1e-4, rel=0.2)


def test_no_gradient_comes_from_visible_patches_of_the_target():
    model, x = double(), IMAGES.double().requires_grad_()
    model.decode = lambda x, t, masking, seen: torch.zeros_like(x)               # what is left is the target
    diffmae.loss(model, "pretrain", x, generator(3))["loss"].backward()
    masked = random_mask(8, 16, 0.75, generator(3)).masked
    assert torch.equal(patchify(x.grad, 2).abs().sum(-1) > 0, masked)


def test_trained_from_the_last_level_it_is_a_masked_autoencoder(monkeypatch):
    model, levels = double(lowest=999), []
    monkeypatch.setattr(model, "decode", lambda x, t, masking, seen: levels.append((t, x)) or x)
    diffmae.loss(model, "pretrain", IMAGES.double(), generator())
    t, x = levels[0]
    assert t.tolist() == [999] * 8 and float((x - MASKING.drop(patchify(IMAGES.double(), 2))).std()) > 1
    with pytest.raises(ValueError, match=r"steps=2 must lie in 1\.\.1"):
        diffmae.inpaint(model, IMAGES.double(), MASKING, generator(), steps=2)


def test_visible_patches_stay_bit_for_bit():
    found = diffmae.inpaint(diffmae.build(TINY), IMAGES, MASKING, generator(), steps=4)
    same = (patchify(found, 2) == patchify(IMAGES, 2)).all(-1)
    assert torch.equal(same, ~MASKING.masked)


def test_a_decoder_that_knows_the_answer_draws_it():
    model, clean = double(), MASKING.drop(patchify(IMAGES.double(), 2))
    model.decode = lambda x, t, masking, seen: clean
    for steps in (1, 2, 20):
        torch.testing.assert_close(diffmae.inpaint(model, IMAGES.double(), MASKING, generator(), steps=steps), IMAGES.double())


def test_one_step_is_what_the_decoder_says_of_pure_noise():
    model = double()
    noise = torch.randn(8, 12, 8, generator=generator(5)).double()
    said = model.decode(noise, torch.full((8,), 999), MASKING, model.encode(IMAGES.double(), MASKING))
    monkey = torch.randn
    try:
        torch.randn = lambda *args, **more: noise
        found = diffmae.inpaint(model, IMAGES.double(), MASKING, generator(), steps=1)
    finally:
        torch.randn = monkey
    torch.testing.assert_close(MASKING.drop(patchify(found, 2)), said)


@pytest.mark.parametrize("config", [TINY, replace(TINY, decoder="cross", layers=3), diffmae.TRAINED["diffmae"]])
def test_computing_is_what_the_closed_form_says(config):
    model, images = diffmae.build(config), torch.zeros(1, config.channels, config.size, config.size)
    masking = random_mask(1, config.tokens, config.ratio, generator())
    once, each = diffmae.macs(config)
    for steps in (1, 3):
        found = count_macs(lambda steps=steps: diffmae.inpaint(model, images, masking, generator(), steps=steps))
        assert found == once + steps * each


def test_another_stage_is_refused():
    with pytest.raises(ValueError, match="stage='fine-tune' must be one of pretrain"):
        diffmae.loss(diffmae.build(TINY), "fine-tune", IMAGES, generator())


# ---- the bundled weights -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bundled() -> tuple[nn.Module, dict]:
    model, path = diffmae.build(diffmae.TRAINED["diffmae"]), methods.weights("diffmae")
    diffmae.load(model, path)
    return model.eval(), json.loads(path.with_suffix(".json").read_text())["metrics"]


def test_the_error_rises_with_the_noise(bundled):
    errors = [*bundled[1]["error_at_level"].values()]
    assert errors == sorted(errors) and len(errors) == 5


def test_one_step_is_nearer_and_many_are_sharper(bundled):
    _, found = bundled
    assert found["error of masked pixels, one step"] < found["error of masked pixels, 50 steps"]
    assert found["sharpness, one step"] < min(found["sharpness, 50 steps"], found["sharpness, real"])


@torch.no_grad()
def test_it_knows_more_than_nothing_of_what_is_masked(bundled):
    model, (images, _) = bundled[0], digits(50)
    masking = random_mask(50, 64, 0.75, generator(8))
    drawn = diffmae.inpaint(model, images, masking, generator(9), steps=1)
    assert float((drawn - images).square().mean()) / 0.75 < 0.6 * float((images - images.mean()).square().mean())
