import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contracts import module
from safetensors.torch import load_file

import methods
from methods import titok
from methods._zoo import load_judge

TINY = titok.TINY
RANDOM = torch.Generator().manual_seed(4)
IMAGES = torch.rand(8, 3, 12, 12, generator=RANDOM)
CODES = torch.randint(TINY.proxy_codes, (8, 9), generator=RANDOM)
TOKENS = torch.randint(TINY.codes, (8, 3), generator=RANDOM)
LABELS = torch.arange(8) % TINY.classes


def run(model, random):
    images = IMAGES.to(model.codes.dtype)
    found, tokens = model.encode(images), titok.generate(model, LABELS, random, steps=2)
    return {"z_q": found.z_q, "index": found.index, "logits": model.decoder(found.z_q), "tokens": tokens,
            "images": model.decode(tokens)}


def loss(model, stage, random):
    x = TOKENS if stage == "generator" else IMAGES
    return titok.loss(model, stage, x, {"proxy": CODES, "pixels": None, "generator": LABELS}[stage], random)


WORK = module.Work(run, {"z_q": (8, 3, 4), "index": (8, 3), "logits": (8, 9, 8), "tokens": (8, 3), "images": (8, 3, 12, 12)},
                   loss, wrong=({"patch": 5}, {"heads": 3}, {"generator_heads": 5}, {"tokens": 0}, {"schedule": "cosine"},
                                {"temperature": -1.0}, {"guidance": math.inf}, {"commitment": math.nan}))


@pytest.mark.parametrize("check, case", module.cases(titok, WORK), ids=module.name)
def test_contract(check, case):
    check(case)


def double(**more):
    return titok.build(replace(TINY, **more)).double()


# ---- the tokenizer -----------------------------------------------------------------------------------------------------

def test_both_towers_see_a_class_token_the_places_and_the_latents():
    model, seen = double(), []
    for tower in (model.encoder, model.decoder):
        tower.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model.decode(model.encode(IMAGES.double()).index)
    assert seen == [(8, 1 + 9 + 3, 16)] * 2


def test_the_decoder_by_hand():
    decoder, z_q = double().decoder, F.normalize(torch.rand(2, 3, 4, dtype=torch.float64, generator=RANDOM), dim=-1)
    w = dict(decoder.named_parameters())
    rows = [w["token"][0] + w["positions"][0], *(w["mask"][0] + w["positions"][1 + n] for n in range(9))]
    codes = z_q @ w["embed.weight"].T + w["embed.bias"] + w["latent_positions"]
    x = F.layer_norm(torch.cat([torch.stack(rows).expand(2, -1, -1), codes], 1), (16,), w["before.weight"], w["before.bias"])
    places = F.layer_norm(decoder.blocks(x)[:, 1:10], (16,), w["after.weight"], w["after.bias"])
    hidden = (places @ w["head.0.weight"].T + w["head.0.bias"]).tanh()
    torch.testing.assert_close(decoder(z_q), hidden @ w["head.2.weight"].T + w["head.2.bias"])


@pytest.mark.parametrize("size", [8, 20])
def test_the_number_of_tokens_does_not_depend_on_the_size_of_the_image(size):
    model = titok.build(replace(TINY, size=size, tokens=5))
    tokens = model.encode(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))).index
    assert tokens.shape == (2, 5) and model.decode(tokens).shape == (2, 3, size, size)


def test_tokens_decode_to_what_their_codes_decode_to():
    model = double()
    found = model.encode(IMAGES.double())
    assert torch.equal(model.decode(found.index), model.paint(model.decoder(found.z_q)))
    torch.testing.assert_close(found.z_q.norm(dim=-1), torch.ones(8, 3, dtype=torch.float64))
    cosine = F.normalize(model.encoder(IMAGES.double()), dim=-1) @ F.normalize(model.codes, dim=-1).T
    assert torch.equal(found.index, cosine.argmax(-1))


def test_a_token_is_made_of_the_channels_of_its_own_latent_unless_the_weights_are_legacy():
    """Permuting the outputs of the transformer over the latents permutes the tokens, but not where channels mix."""
    model, order, images = double(), torch.tensor([2, 0, 1]), IMAGES.double()
    plain, legacy = model.encoder(images), replace(TINY, legacy=True)
    mixed = titok.build(legacy).double()
    mixed.load_state_dict(model.state_dict())
    mixed_plain = mixed.encoder(images)
    for tower in (model.encoder, mixed.encoder):
        tower.run = lambda places, latents, run=tower.run: (None, run(places, latents)[1][:, order])
    torch.testing.assert_close(model.encoder(images), plain[:, order])
    assert not torch.allclose(mixed.encoder(images), mixed_plain[:, order]) and not torch.allclose(mixed_plain, plain)


def test_certain_logits_paint_what_the_grid_tokenizer_does():
    model = double()
    logits = 1e4 * F.one_hot(CODES, TINY.proxy_codes).double()
    hard = model.pixels(model.proxy[CODES].mT.unflatten(-1, (3, 3)))
    assert torch.equal(model.paint(logits), hard)
    uniform = model.pixels(model.proxy.mean(0).expand(8, 9, -1).mT.unflatten(-1, (3, 3)))
    torch.testing.assert_close(model.paint(torch.zeros_like(logits)), uniform)


def test_the_grid_tokenizer_becomes_a_part():
    codebook, pixels = torch.rand(TINY.proxy_codes, TINY.proxy_depth), torch.nn.ConvTranspose2d(TINY.proxy_depth, 3, 4, 4)
    model = titok.build(TINY, codebook, pixels)
    assert torch.equal(model.proxy, codebook) and model.pixels is pixels
    with pytest.raises(ValueError, match=r"codebook has shape \(6, 8\), not \(8, 6\)"):
        titok.build(TINY, codebook.T)


# ---- the stages --------------------------------------------------------------------------------------------------------

def test_the_proxy_loss_is_a_cross_entropy_over_the_places_beside_the_quantiser():
    model = double()
    found = model.encode(IMAGES.double())
    for parameter in model.decoder.head[2].parameters():
        parameter.data.zero_()
    quantiser = found.codebook_loss + 0.25 * found.commitment_loss
    torch.testing.assert_close(titok.loss(model, "proxy", IMAGES.double(), CODES) - quantiser,
                               torch.tensor(math.log(8), dtype=torch.float64))
    model.decoder.head[2].bias.data[:] = torch.arange(8)
    expected = -torch.arange(8.0).double().log_softmax(0)[CODES].mean()
    torch.testing.assert_close(titok.loss(model, "proxy", IMAGES.double(), CODES) - quantiser, expected)


def test_of_a_thousand_proxy_codes_nothing_is_known_at_first():
    assert math.log(titok.Config().proxy_codes) == pytest.approx(6.931, abs=1e-3)


def test_the_second_stage_leaves_encoder_and_codebook_bit_for_bit():
    model = titok.build(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(titok.enter(model, "pixels"), lr=1e-2, weight_decay=0.1)
    first = titok.loss(model, "pixels", IMAGES)
    for _ in range(10):
        optimizer.zero_grad()
        titok.loss(model, "pixels", IMAGES).backward()
        optimizer.step()
    assert titok.loss(model, "pixels", IMAGES) < first
    torch.testing.assert_close(first, (titok.build(TINY).decode(model.encode(IMAGES).index) - IMAGES).square().mean())
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"decoder", "proxy", "pixels"}


def test_a_masked_share_falls_as_arccos():
    masked = titok.hide(20000, 10, torch.Generator().manual_seed(0))
    count = masked.sum(1)
    assert count.min() == 1 and count.max() == 10
    # P(count <= n) = P(arccos(u) <= (n + 1/2) pi / 20) = 1 - cos((n + 1/2) pi / 20)
    for n in range(1, 10):
        assert float((count <= n).double().mean()) == pytest.approx(1 - math.cos((n + 0.5) * math.pi / 20), abs=0.015)
    assert (masked.double().mean(0) - masked.double().mean()).abs().max() < 0.015


def test_codes_mask_classes_and_no_class_have_ids_of_their_own():
    model, seen = titok.build(TINY), []
    model.generator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = torch.tensor([[0, 15, 16]])                                        # the first and the last code, the mask
    for label in range(TINY.classes + 1):
        assert model.predict(tokens, torch.tensor([label])).shape == (1, 3, 16)
    assert torch.cat(seen).tolist() == [[17 + label, 0, 15, 16] for label in range(5)]
    assert model.generator.config.vocab_size == 22


def test_the_generator_learns_most_from_what_it_does_not_see():
    """The loss is the weighted mean of smoothed cross-entropies, worked here by a loop."""
    model, seen = double(), []
    model.predict = lambda tokens, labels: seen.append((tokens, labels)) or titok.TiTok.predict(model, tokens, labels)
    loss = titok.loss(model, "generator", TOKENS, LABELS, torch.Generator().manual_seed(3))
    tokens, labels = seen[0]
    logp = titok.TiTok.predict(model, tokens, labels).log_softmax(-1)
    total = weights = 0
    for b in range(8):
        for k in range(3):
            hidden = int(tokens[b, k]) == TINY.codes
            assert hidden or tokens[b, k] == TOKENS[b, k]
            target = torch.full((16,), 0.1 / 16, dtype=torch.float64)
            target[TOKENS[b, k]] += 0.9
            total, weights = total - (1 if hidden else 0.1) * (target * logp[b, k]).sum(), weights + (1 if hidden else 0.1)
    torch.testing.assert_close(loss, total / weights)
    assert ((labels == LABELS) | (labels == TINY.classes)).all()


def test_a_tenth_of_the_labels_is_hidden():
    model, seen = titok.build(TINY), []
    model.predict = lambda tokens, labels: seen.append(labels) or torch.zeros(*tokens.shape, TINY.codes)
    titok.loss(model, "generator", TOKENS[:1].repeat(5000, 1), LABELS[:1].repeat(5000), torch.Generator().manual_seed(0))
    assert float((seen[0] == TINY.classes).double().mean()) == pytest.approx(0.1, abs=0.015)


# ---- sampling ----------------------------------------------------------------------------------------------------------

def test_the_schedule_of_32_tokens_in_8_steps():
    assert titok.remaining(32, 8) == [29, 26, 24, 21, 18, 14, 10, 0]
    fixed = [a - b for a, b in zip([32, 29, 26, 24, 21, 18, 14, 10], titok.remaining(32, 8), strict=True)]
    assert fixed == [3, 3, 2, 3, 3, 4, 4, 10] and sum(fixed) == 32


@pytest.mark.parametrize("tokens, steps", [(1, 1), (1, 4), (5, 1), (5, 12), (64, 64), (17, 3)])
def test_a_schedule_falls_and_ends_with_nothing_masked(tokens, steps):
    left = titok.remaining(tokens, steps)
    assert len(left) == steps and left[-1] == 0 and min(left[:-1], default=1) >= 1
    assert all(b < a or b == 1 or b == 0 for a, b in zip([tokens, *left], left, strict=False))


def test_guidance_by_step():
    linear = replace(TINY, guidance=4.5, schedule="linear")
    assert [titok.guidance(linear, s) for s in range(8)] == [0, 0.5625, 1.125, 1.6875, 2.25, 2.8125, 3.375, 3.9375]
    assert {titok.guidance(replace(linear, schedule="constant"), s) for s in range(8)} == {4.5}
    power = replace(TINY, guidance=6.9, schedule="power-cosine")
    found = [titok.guidance(power, s) for s in range(8)]
    assert found[0] == 0 and found == sorted(found)
    assert found[4] == pytest.approx(5.9 * (1 - math.cos(math.pi / 8)) / 2)            # 1 + this is the official scale
    assert {titok.guidance(replace(power, guidance=1.0), s) for s in range(8)} == {0}


def passes(model, monkeypatch):
    """The tokens and labels of every pass through the generator."""
    seen = []
    monkeypatch.setattr(model, "predict", lambda tokens, labels: seen.append((tokens, labels))
                        or titok.TiTok.predict(model, tokens, labels))
    return seen


@pytest.mark.parametrize("schedule", ["constant", "linear", "power-cosine"])
def test_what_is_fixed_stays_and_the_schedule_is_kept(monkeypatch, schedule):
    model = titok.build(replace(TINY, tokens=9, generator_layers=2))
    seen = passes(model, monkeypatch)
    labels = torch.arange(40) % 4
    tokens = titok.generate(model, labels, torch.Generator().manual_seed(1), schedule=schedule, guidance=2.0, steps=5)
    states = [each for each, asked in seen if torch.equal(asked, labels)] + [tokens]
    assert [int((row == TINY.codes).sum()) for row in (state[0] for state in states)] == [9, *titok.remaining(9, 5)]
    for before, after in zip(states, states[1:], strict=False):
        assert ((after == TINY.codes).sum(1) == (after[0] == TINY.codes).sum()).all()
        fixed = before != TINY.codes
        assert torch.equal(after[fixed], before[fixed])
    assert (tokens < TINY.codes).all() and (tokens >= 0).all()


def test_without_weight_there_is_no_unconditional_pass(monkeypatch):
    model = titok.build(TINY)
    for more, count in (({"guidance": 0.0, "schedule": "constant"}, 4), ({"schedule": "linear"}, 7),
                        ({"guidance": 1.0, "schedule": "power-cosine"}, 4), ({"schedule": "constant"}, 8)):
        seen = passes(model, monkeypatch)
        titok.generate(model, LABELS, torch.Generator().manual_seed(0), steps=4, **more)
        assert len(seen) == count, more


def test_greedy_in_one_step_takes_the_guided_argmax():
    model = double(guidance=2.0, schedule="constant", steps=1)
    masked, none = torch.full((8, 3), TINY.codes), torch.full((8,), TINY.classes)
    cond, uncond = model.predict(masked, LABELS), model.predict(masked, none)
    assert torch.equal(titok.generate(model, LABELS, torch.Generator()), (3 * cond - 2 * uncond).argmax(-1))


def test_tokens_are_drawn_and_ranked_by_noisy_logits():
    """The first of two steps by a loop of its own, with the draws of the same generator."""
    model, u, labels = double(tokens=5), torch.Generator().manual_seed(7), torch.arange(400) % 4
    state = torch.full((400, 5), TINY.codes)
    logits = model.predict(state, labels).detach() / (0.5 + 0.8 / 2)
    noise = [-torch.log(-torch.log(torch.rand(400, 5, *more, dtype=torch.float64, generator=u))) for more in ((16,), ())]
    drawn = (logits + 1.5 * noise[0]).argmax(-1)
    kept = state.clone()
    for b in range(400):
        ranked = sorted(range(5), key=lambda k: float(logits[b, k, drawn[b, k]] + 1.5 * noise[1][b, k]))
        for k in ranked[titok.remaining(5, 2)[0]:]:
            kept[b, k] = drawn[b, k]
    states = []
    model.predict = lambda tokens, labels: states.append(tokens) or titok.TiTok.predict(model, tokens, labels)
    titok.generate(model, labels, torch.Generator().manual_seed(7), steps=2, temperature=3.0, guidance=0.0)
    assert torch.equal(states[1], kept) and ((kept == TINY.codes).sum(1) == titok.remaining(5, 2)[0]).all()


def test_hot_tokens_vary_and_cold_ones_do_not():
    model = double(steps=3)
    def draw(seed, heat):
        return titok.generate(model, LABELS, torch.Generator().manual_seed(seed), temperature=heat)
    assert torch.equal(draw(0, 0.0), draw(1, 0.0)) and not torch.equal(draw(0, 9.5), draw(1, 9.5))


def test_bad_inputs_are_named():
    model = titok.build(TINY)
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 12, 16\); this model takes \(B, 3, 12, 12\)"):
        model.encode(torch.zeros(2, 3, 12, 16))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3; these reach from 0 to 4"):
        titok.generate(model, torch.tensor([0, 4]), torch.Generator())
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        titok.generate(model, LABELS, torch.Generator(), steps=0)
    assert titok.generate(model, LABELS, torch.Generator(), temperature=0, guidance=0).max() < TINY.codes
    with pytest.raises(ValueError, match="codes, tokens cannot change in a network that is built"):
        titok.generate(model, LABELS, torch.Generator(), tokens=4, codes=8, steps=2)
    for stage, target in (("proxy", None), ("generator", LABELS), ("pixel", IMAGES)):
        with pytest.raises(ValueError, match=f"stage='{stage}' must be one of proxy, pixels, generator"):
            titok.loss(model, stage, IMAGES, target)


# ---- the bundled weights -----------------------------------------------------------------------------------------------

@pytest.fixture(params=list(titok.TRAINED))
def bundled(request):
    """A trained model, and its card."""
    path, model = methods.weights(request.param), titok.build(titok.TRAINED[request.param])
    titok.load(model, path)
    return model.eval(), json.loads(path.with_suffix(".json").read_text()), path


def test_card_and_weights_agree(bundled):
    model, card, path = bundled
    assert titok.Config(**card["config"]) == model.config and [stage["steps"] for stage in card["stages"]]
    assert card["bytes"] == path.stat().st_size <= 4 * 2 ** 20
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    for losses in card["loss"]:
        assert losses[-1][1] < losses[0][1]


@torch.no_grad()
def test_the_digits_asked_for_are_drawn(bundled):
    model, card, _ = bundled
    labels = torch.arange(50) % 10
    images = model.decode(titok.generate(model, labels, torch.Generator().manual_seed(1)))
    right = float((load_judge()(images).argmax(-1) == labels).double().mean())
    assert right >= 0.6 and abs(right - card["metrics"]["label_accuracy"][str(model.config.steps)]) < 0.25


def test_more_tokens_rebuild_better():
    cards = [json.loads(methods.weights(name).with_suffix(".json").read_text()) for name in titok.TRAINED]
    found = [(card["metrics"]["tokens"], card["metrics"]["mse"]) for card in cards]
    assert found == sorted(found) and [mse for _, mse in found] == sorted((mse for _, mse in found), reverse=True)
