import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributions as D
from contracts import module
from safetensors.torch import load_file
from torch import nn

import methods
from methods import dicode
from methods._zoo import load_judge

TINY = dicode.TINY
RANDOM = torch.Generator().manual_seed(4)
CLIPS = torch.rand(6, 3, 1, 8, 8, generator=RANDOM) * 2 - 1
TOKENS = torch.randn(6, 8, 4, generator=RANDOM)                                # two clips of four tokens
WORDS = torch.randint(TINY.words, (6, 2), generator=RANDOM)


def run(model, random):
    dtype = model.language.embed.weight.dtype
    tokens = model.encode(CLIPS.to(dtype))
    drawn = dicode.generate(model, WORDS, random, clips=2)
    return {"tokens": tokens, "raw": model.language(WORDS, tokens), "drawn": drawn,
            "clips": model.decode(drawn[:, 1].to(dtype), random)}


def loss(model, stage, random):
    return dicode.loss(model, stage, CLIPS if stage == "tokens" else TOKENS, WORDS, random)


WORK = module.Work(run, {"tokens": (6, 4, 4), "raw": (6, 5, 18), "drawn": (6, 2, 4, 4), "clips": (6, 3, 1, 8, 8)}, loss,
                   wrong=({"patch": 5}, {"heads": 3}, {"language_heads": 5}, {"per_frame": 0}, {"var_scale": -1.0},
                          {"places": 0}, {"components": 0}))


@pytest.mark.parametrize("check, case", module.cases(dicode, WORK), ids=module.name)
def test_contract(check, case):
    check(case)


def double(**more):
    return dicode.build(replace(TINY, **more)).double()


# ---- densities ---------------------------------------------------------------------------------------------------------

def raw(means, deviations, logits):
    """What a head must say for these k components (k, d)."""
    variances = torch.as_tensor(deviations, dtype=torch.float64) ** 2
    parts = torch.as_tensor(means, dtype=torch.float64), variances.expm1().log(), torch.as_tensor(logits, dtype=torch.float64)
    return torch.cat([part.flatten() for part in parts])


def test_likelihoods_worked_by_hand():
    y = torch.tensor([1.0], dtype=torch.float64)
    pair = raw([[-1], [1]], [[1], [1]], [0, 0])
    assert float(dicode.nll(pair, y, 2)) == pytest.approx(1.4852, abs=1e-4)         # -log .22647
    assert float(dicode.nll(raw([[0]], [[1]], [0]), y, 1)) == pytest.approx(1.41894, abs=1e-5)
    sharp = raw([[-1], [1]], [[0.1], [0.1]], [0, 0])
    assert float(dicode.nll(sharp, y, 2)) == pytest.approx(-0.69050, abs=1e-4)
    assert float(dicode.expected(sharp, 2)) == pytest.approx(0)                    # which the data never is
    assert 0.5 * math.log(2 * math.pi * math.e) == pytest.approx(1.41894, abs=1e-5)    # the least of one Gaussian on +-1


def test_a_mixture_learns_two_futures_and_one_gaussian_does_not():
    found, y = {}, torch.tensor([[-1.0], [1.0]]).repeat(8, 1)
    for k in (1, 2, 4):
        head = nn.Parameter(torch.randn(2 * k + k, generator=torch.Generator().manual_seed(k)))
        optimizer = torch.optim.Adam([head], lr=0.1)
        for _ in range(150):
            optimizer.zero_grad()
            found[k] = dicode.nll(head.expand(16, -1), y, k).mean()
            found[k].backward()
            optimizer.step()
        drawn = dicode.draw(head.detach().expand(500, -1), k, 0.1, torch.Generator().manual_seed(0))[:, 0]
        near = float(((drawn.abs() - 1).abs() < 0.2).float().mean())
        assert near > 0.95 if k > 1 else near < 0.3
        assert abs(float(dicode.expected(head.detach(), k))) < 0.2
    assert found[1] >= 1.41894 - 1e-4 and found[2] < 0 and found[4] < found[1]


@pytest.mark.parametrize("components", [1, 2, 5])
def test_the_density_is_that_of_torch(components):
    """And of the sister project's code, whose loss is this one: one component a token, softplus the variance."""
    x = torch.randn(3, 4, 2 * components * 6 + components, generator=RANDOM, dtype=torch.float64)
    y = torch.randn(3, 4, 6, generator=RANDOM, dtype=torch.float64)
    means, variances, logits = dicode.density(x, components)
    mixture = D.MixtureSameFamily(D.Categorical(logits=logits), D.Independent(D.Normal(means, variances.sqrt()), 1))
    torch.testing.assert_close(dicode.nll(x, y, components), (-mixture.log_prob(y) / 6).float().double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dicode.expected(x, components), mixture.mean)


def test_equal_components_are_one_whatever_their_weights():
    one = raw([[0.3, -2.0]], [[0.5, 1.5]], [0])
    many = raw([[0.3, -2.0]] * 3, [[0.5, 1.5]] * 3, [4, -1, 0])
    y = torch.tensor([0.1, -1.0], dtype=torch.float64)
    torch.testing.assert_close(dicode.nll(many, y, 3), dicode.nll(one, y, 1))


def test_without_variance_a_draw_is_a_mean():
    x = torch.randn(200, 3 * (2 * 4 + 1), generator=RANDOM)
    drawn, means = dicode.draw(x, 3, 0.0, torch.Generator().manual_seed(0)), dicode.density(x, 3)[0]
    hit = (drawn[:, None] == means).all(-1)
    assert (hit.sum(1) == 1).all() and hit.any(0).all()


def test_draws_have_the_moments_of_the_density():
    x = raw([[-1, 2], [3, 0]], [[0.5, 1], [1, 0.2]], [math.log(3), 0]).expand(20000, -1)
    drawn = dicode.draw(x, 2, 0.25, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.0, 1.5], dtype=torch.float64), atol=0.05, rtol=0)
    first = drawn[drawn[:, 0] < 1]
    assert len(first) / 20000 == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(first.std(0), torch.tensor([0.25, 0.5], dtype=torch.float64), atol=0.02, rtol=0)


# ---- tokens ------------------------------------------------------------------------------------------------------------

def test_counts():
    full = dicode.Config()
    assert full.tokens == 16 and dicode.token_count(60, full) == 480 and dicode.token_count(3, full) == 32
    assert 16 * 32 * 32 / full.tokens == 1024                                      # arithmetic, not a measurement
    head = dicode.build(replace(TINY, depth=256, components=16)).language.head
    assert head.out_features == 8208


def test_only_end_frames_are_read():
    model, other = double(), CLIPS.double().clone()
    tokens = model.encode(CLIPS.double())
    other[:, 1] = 0
    assert torch.equal(model.encode(other), tokens)
    other[:, -1] = 0
    assert torch.equal(model.encode(other)[:, :2], tokens[:, :2]) and not torch.equal(model.encode(other), tokens)
    assert torch.equal(model.encode(CLIPS[:, 0].double()), tokens[:, :2])            # a frame gives the same
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(6, 4, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(6, 4, dtype=torch.float64), atol=1e-2, rtol=0)


def test_the_language_model_is_causal():
    model, tokens = double(), TOKENS.double()
    before = model.language(WORDS, tokens)
    for n in range(8):
        moved = tokens.clone()
        moved[:, n] += 1
        after = model.language(WORDS, moved)
        assert torch.equal(after[:, :n + 1], before[:, :n + 1]) and not torch.equal(after[:, n + 1], before[:, n + 1])


def test_the_diffusion_loss_teaches_the_queries_and_not_the_frame_encoder():
    model = dicode.build(TINY)
    dicode.loss(model, "tokens", CLIPS, random=torch.Generator().manual_seed(0)).backward()
    assert model.resampler.queries.grad.abs().max() > 0 and all(weight.grad is None for weight in model.frames.parameters())
    given = dicode.build(TINY, nn.Conv2d(1, 6, 4, 4))
    assert not any(weight.requires_grad for weight in given.frames.parameters())


def test_tokens_are_drawn_one_by_one_with_a_sliding_context(monkeypatch):
    model, seen = double(context=2), []
    real = model.language.forward
    monkeypatch.setattr(model.language, "forward", lambda words, tokens: seen.append(tokens) or real(words, tokens))
    drawn = dicode.generate(model, WORDS, torch.Generator().manual_seed(1), clips=3)
    assert [tokens.shape[1] for tokens in seen] == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert torch.equal(seen[-1], drawn[:, 1:].flatten(1, 2)[:, :-1].to(seen[-1]))
    more = dicode.generate(model, WORDS, torch.Generator().manual_seed(2), before=drawn[:, :2], mean=True)
    raw = model.language(WORDS, drawn[:, 1].to(torch.float64))[:, -1]
    torch.testing.assert_close(more[:, 0, 0], dicode.expected(raw, 2).to(more))


def test_a_clip_is_drawn_by_ddim(monkeypatch):
    """With a de-tokenizer that knows the clip, its steps end there."""
    model = double(steps=4)
    scheduler, clip = model.scheduler, CLIPS.double()

    def knows(x, t, tokens):
        a = scheduler.alphas_cumprod[int(t[0])].double().sqrt()
        s = (1 - a ** 2).sqrt()
        return (a * x - clip) / s                                                  # x0 = a x - s v
    monkeypatch.setattr(model.denoiser, "forward", knows)
    drawn = model.decode(TOKENS[:, :4].double(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, clip, atol=1e-4, rtol=1e-4)


def test_bad_inputs_are_named():
    model = dicode.build(TINY)
    with pytest.raises(ValueError, match=r"frames have shape \(1, 8, 12\); this model takes \(1, 8, 8\)"):
        model.encode(torch.zeros(2, 3, 1, 8, 12))
    with pytest.raises(ValueError, match="clips_per_second cannot change in a network that is built"):
        dicode.generate(model, WORDS, torch.Generator(), clips_per_second=3)
    for stage, more in (("tokens", {}), ("language", {}), ("token", {"words": WORDS})):
        with pytest.raises(ValueError, match=f"stage='{stage}' must be 'tokens', with draws, or 'language', with words"):
            dicode.loss(model, stage, CLIPS, **more)


# ---- the bundled weights -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bundled():
    """The trained model, and its card."""
    path, model = methods.weights("dicode"), dicode.build(dicode.TRAINED["dicode"], load_judge("video_judge").stages[:2])
    dicode.load(model, path)
    return model.eval(), json.loads(path.with_suffix(".json").read_text()), path


def test_card_and_weights_agree(bundled):
    model, card, path = bundled
    assert dicode.Config(**card["config"]) == model.config
    assert card["bytes"] == path.stat().st_size <= 2 * 2 ** 20
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert all(losses[-1][1] < losses[0][1] for losses in card["loss"])


def test_the_card_says_what_tokens_and_mixture_are_worth(bundled):
    metrics = bundled[1]["metrics"]
    assert metrics["error"] < 0.6 * metrics["error_of_others"] and metrics["rebuilt_on_a_side"] > 0.9
    assert metrics["on_a_side"] > metrics["mean_on_a_side"] and 0.2 < metrics["right"] < 0.8


@pytest.mark.slow
def test_both_futures_are_drawn(bundled):
    """Without data: behind the tokens of a block at rest, clips end at either side."""
    from accel_tools.measure.dicode import where
    model = bundled[0]
    clip = torch.full((24, 8, 1, 16, 16), -1.0)
    clip[:, :, :, 6:10, 7:9] = 1                                                   # an upright stroke, a one
    words, before = torch.ones(24, 1).long(), model.encode(clip)[:, None]
    drawn = dicode.generate(model, words, torch.Generator().manual_seed(0), before=before)
    place = where(model.decode(drawn[:, 0], torch.Generator().manual_seed(0)))
    assert 0 < float((place > 0.5).float().mean()) < 1 and float(((place - 0.5).abs() > 0.25).float().mean()) > 0.5
