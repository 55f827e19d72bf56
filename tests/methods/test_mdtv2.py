import math
from dataclasses import replace

import pytest
import torch
from contracts import module
from drawn import digits

import methods
from accel_tools.measure.macs import count_macs
from methods import mdtv2
from methods._core.dit import ddpm, hidden
from methods._core.masking import Masking, random_mask
from methods._core.noise import Noising

TINY = mdtv2.TINY
IMAGES = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
LABELS = torch.arange(8) % (TINY.classes + 1)
TIMES = torch.arange(8) * 140


def run(model, random):
    x = IMAGES.to(model.mask.dtype)
    return {"images": mdtv2.generate(model, LABELS, random, steps=3), "said": model(x, TIMES, LABELS)}


WORK = module.Work(run, {"images": (8, 2, 8, 8), "said": (8, 4, 8, 8)},
                   lambda model, stage, random: mdtv2.loss(model, stage, IMAGES, LABELS, random)["loss"],
                   wrong=({"patch": 3}, {"heads": 3}, {"layers": 4}, {"layers": 1}, {"ratio": 0.9}, {"more": 0.65},
                          {"width": 18}, {"drop": math.nan}))


@pytest.mark.parametrize("check, case", module.cases(mdtv2, WORK), ids=module.name)
def test_contract(check, case):
    check(case)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def started(**more):
    """A network none of whose layers is zero."""
    model = mdtv2.build(replace(TINY, **more)).double()
    random = generator(1)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=random)
    return model


# ---- the network -------------------------------------------------------------------------------------------------------

def test_a_bias_depends_on_the_distance_alone():
    table = mdtv2.distances(3)
    at = [(y, x) for y in range(3) for x in range(3)]
    numbers = {}
    for i, (a, b) in enumerate(at):
        for j, (c, d) in enumerate(at):
            numbers.setdefault((a - c, b - d), set()).add(int(table[i, j]))
    assert all(len(found) == 1 for found in numbers.values()) and len(set.union(*numbers.values())) == len(numbers) == 25
    assert table.min() == 0 and table.max() == 24


def test_attention_with_a_bias_by_hand():
    block, x, cond = started().inner[0], torch.randn(2, 16, 16, generator=generator()).double(), torch.zeros(2, 16).double()
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation[1].bias.chunk(6)
    q, k, v = block.qkv(block.norm1(x) * (1 + scale1) + shift1).chunk(3, -1)
    found = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        scores = q[..., part] @ k[..., part].mT / 8 ** 0.5 + block.bias[block.distance][..., head]
        found.append(scores.softmax(-1) @ v[..., part])
    y = x + gate1 * block.out(torch.cat(found, -1))
    torch.testing.assert_close(block.run(x, cond), y + gate2 * block.mlp(block.norm2(y) * (1 + scale2) + shift2))


def test_tokens_that_all_stay_are_a_sequence_without_a_mask():
    model, order = started(), torch.arange(16).expand(8, -1)
    whole = Masking(order, 16)
    for block in (*model.inner, *model.outer):
        x, cond, skip = (torch.randn(*shape, generator=generator(3)).double() for shape in ((8, 16, 16), (8, 16), (8, 16, 16)))
        torch.testing.assert_close(block.run(x, cond, whole, skip), block.run(x, cond, None, skip))
    torch.testing.assert_close(model(IMAGES.double(), TIMES, LABELS, whole), model(IMAGES.double(), TIMES, LABELS))


def test_the_encoder_sees_what_stays_wherever_it_stands():
    """The order of the tokens that stay changes nothing, since bias and positions go with them."""
    model, masking = started(), random_mask(8, 16, 0.5, generator())
    turned = Masking(torch.cat([masking.kept.flip(1), masking.order[:, 8:]], 1), 8)
    torch.testing.assert_close(model(IMAGES.double(), TIMES, LABELS, turned), model(IMAGES.double(), TIMES, LABELS, masking))


@pytest.mark.parametrize("ratio, kept", [(0.3, 44), (0.5, 32)])
def test_how_many_stay(ratio, kept):
    model, seen = mdtv2.build(replace(TINY, size=16, ratio=ratio, more=0.0)), []
    for block in (model.inner[0], model.outer[0], model.side, model.decoder[0]):
        block.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    mdtv2.loss(model, "both", torch.zeros(2, 2, 16, 16), LABELS[:2], generator())
    assert seen == [64, 64, 64, kept, kept, 64, 64]                              # the plain pass has no side block


def test_the_share_of_masked_tokens_is_drawn_for_each_step():
    model, seen = mdtv2.build(replace(TINY, size=32)), []
    model.outer[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    random = generator()
    for _ in range(60):
        mdtv2.loss(model, "both", torch.zeros(1, 2, 32, 32), LABELS[:1], random)
    shares = 1 - torch.tensor(seen[1::2]) / 256
    assert shares.min() < 0.33 and shares.max() > 0.47 and 0.3 <= shares.min() and shares.max() <= 0.5 + 1 / 256
    assert set(seen[::2]) == {256}


def test_the_side_block_changes_what_is_masked_and_nothing_else():
    model, masking, x = started(), random_mask(8, 16, 0.5, generator()), torch.randn(8, 8, 16, generator=generator(2)).double()
    q = masking.fill(x, model.mask[0]) + model.decoder_places
    found = model.interpolate(x, torch.zeros(8, 16).double(), masking)
    assert torch.equal(found[~masking.masked], q[~masking.masked])
    assert (found != q)[masking.masked].any(-1).all()


def test_without_a_mask_nothing_of_it_is_reached():
    model = started(ratio=0.0)
    found = mdtv2.loss(model, "both", IMAGES.double(), LABELS, generator())
    found["loss"].backward()
    assert set(found) == {"loss", "plain"} and model.mask.grad is None
    assert all(weight.grad is None for weight in model.side.parameters())
    assert all(weight.grad is not None for name, weight in model.named_parameters()
               if name.split(".")[0] not in ("mask", "side"))


def test_long_skips_are_taken_last_first_and_the_decoder_gets_the_embedding():
    model, came, went = started(layers=9, decoder_layers=3), [], []
    for block in model.inner:
        run = block.run
        block.run = lambda *args, run=run: came.append(run(*args)) or came[-1]
    for block in (*model.outer, *model.decoder):
        block.skip.register_forward_pre_hook(lambda _, args: went.append(args[0][..., 16:]))
    model(IMAGES.double(), TIMES, LABELS)
    assert len(came) == 3 and all(torch.equal(a, b) for a, b in zip(went[:3], came[::-1], strict=True))
    embedded = model.embed(mdtv2.patchify(IMAGES.double(), 2)) + model.places
    assert len(went) == 6 and all(torch.equal(each, embedded) for each in went[3:])


# ---- the loss ----------------------------------------------------------------------------------------------------------

def test_weights_by_the_ratio_of_signal_to_noise():
    found = mdtv2.weighting(torch.tensor([0.01, 5.0, 50.0, 500.0]), 5.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.1, 0.01]))


def test_the_loss_by_hand(monkeypatch):
    """Both passes at the same times, each with noise and hidden labels of its own; a weight on the error, none on the bound."""
    model, random, noising = started(), generator(5), Noising(ddpm())
    x0, total = IMAGES.double(), 0
    found = mdtv2.loss(model, "both", x0, LABELS, random)
    random.manual_seed(5)
    noisy = noising.sample(x0, random)
    for part in ("plain", "masked"):
        if part == "masked":
            masking = random_mask(8, 16, 0.3 + 0.2 * float(torch.rand((), generator=random)), random)
            again = noising.sample(x0, random, t=noisy.t)
            assert torch.equal(again.t, noisy.t) and not torch.equal(again.eps, noisy.eps)
            noisy = again
        labels = hidden(LABELS, TINY.classes, 0.1, random)
        said = model(noisy.x, noisy.t, labels, masking if part == "masked" else None)
        error = torch.tensor(0.0, dtype=torch.float64)
        for b in range(8):
            snr = float(noising.snr(noisy.t[b:b + 1]))
            error = error + (said[b, :2] - noisy.eps[b]).square().mean() * min(snr, 5) / snr / 8
        torch.testing.assert_close(found[part], error, rtol=1e-5, atol=0)
        total = total + error + noising.variance_bound(said[:, :2], said[:, 2:], noisy).mean()
    torch.testing.assert_close(found["loss"], total, rtol=1e-5, atol=0)


# ---- what it costs -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [TINY, mdtv2.TRAINED["mdtv2"], replace(TINY, size=16, layers=9, decoder_layers=3)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_computing_is_what_the_closed_form_says(config, ratio):
    model, x = mdtv2.build(config), torch.zeros(1, config.channels, config.size, config.size)
    masking = random_mask(1, config.tokens, ratio, generator()) if ratio else None
    found = count_macs(lambda: model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long), masking))
    assert found == mdtv2.macs(config, ratio)


# ---- sampling ----------------------------------------------------------------------------------------------------------

def test_guidance_rises_from_one():
    assert mdtv2.guidance_at(1000) == 1 and mdtv2.guidance_at(0) == pytest.approx(3.8)
    assert mdtv2.guidance_at(0, weight=2.0) == pytest.approx(2)
    assert mdtv2.guidance_at(500) == pytest.approx(1 + 2.8 * (1 - math.cos(math.pi / 16)) / 2)
    found = [mdtv2.guidance_at(t) for t in range(0, 1001, 50)]
    assert found == sorted(found, reverse=True)


def test_samples_follow_guidance():
    model = started()
    plain, strong = (mdtv2.generate(model, LABELS, generator(), steps=6, guidance=weight) for weight in (1.0, 5.0))
    none = LABELS == TINY.classes
    assert torch.allclose(plain[none], strong[none]) and not torch.allclose(plain[~none], strong[~none])


def test_what_is_seen_is_bounded_where_asked():
    assert mdtv2.generate(started(clip=0.5), LABELS, generator(), steps=1).abs().max() == 0.5
    assert mdtv2.generate(started(), LABELS, generator(), steps=1).abs().max() > 0.5


def test_bad_inputs_are_named():
    model = mdtv2.build(TINY)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, 4 for none; these reach from -1 to 0"):
        mdtv2.generate(model, torch.tensor([0, -1]), generator())
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps={steps} must lie in 1..1000"):
            mdtv2.generate(model, LABELS, generator(), steps=steps)
    with pytest.raises(ValueError, match="stage='plain' must be one of both"):
        mdtv2.loss(model, "plain", IMAGES, LABELS, generator())


# ---- the bundled weights -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_bundled_weights_know_digits_from_noise():
    """The error of an untrained network falls to less than 0.2 of it, on digits of another model."""
    images, labels = digits()
    model = mdtv2.build(mdtv2.TRAINED["mdtv2"])
    before = mdtv2.loss(model, "both", images, labels, generator(9))["plain"]
    mdtv2.load(model, methods.weights("mdtv2"))
    assert mdtv2.loss(model, "both", images, labels, generator(9))["plain"] < 0.2 * before
