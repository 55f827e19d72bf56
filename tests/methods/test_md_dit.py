import math

import pytest
import torch
from contracts import training

import methods
from accel_tools.measure.macs import count_macs
from methods import md_dit
from methods._core.noise import Noising
from methods._trained import weights_card


@pytest.mark.parametrize("check, case", training.cases(md_dit), ids=training.name)
def test_contract(check, case):
    check(case)


def digits(dtype=torch.float32, **config):
    """The DiT of digits, itself converted, and an input of two."""
    model = methods.tiny("dit").transformer.to(dtype)
    x = torch.randn(2, 1, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return model, md_dit.convert(model, md_dit.Config(**config)), x


@torch.no_grad()
def answer(model, x, t=500):
    return model(x, timestep=torch.as_tensor(t).expand(len(x)), class_labels=torch.arange(len(x))).sample


def run(model, x, times):
    """The outputs at these timesteps, one after the other, of a latent that changes a little."""
    return [answer(model, x * (1 + i / 50), t) for i, t in enumerate(times)]


class Double(torch.nn.Module):
    """A block that doubles its tokens, so adds them to themselves."""

    def forward(self, x):
        return 2 * x


# ---- the design -------------------------------------------------------------------------------------------------------

def test_two_tokens_by_hand():
    """The first is taken with weight .9, the second gets what was added when all were."""
    routed = md_dit.Routed(Double(), torch.nn.Linear(1, 1), md_dit.Config(), torch.Generator())
    with torch.no_grad():
        routed.router.token.weight.fill_(1.0)
        routed.router.token.bias.fill_(0.0)
        assert routed(torch.tensor([[[3.0], [5.0]]])).flatten().tolist() == [6, 10]
        routed.share, routed.e = 0.5, md_dit.waves(torch.tensor([500]))
        x = torch.tensor([[[math.log(9)], [1.0]]])                                      # sigmoid(log 9) = .9
        out = routed(x)
        assert out.flatten().tolist() == pytest.approx([math.log(9) * 1.9, 6.0])
        assert routed.kept.flatten().tolist() == pytest.approx([0.9 * math.log(9), 5.0])
        routed.config = md_dit.Config(bypass="plain")
        assert routed(x).flatten().tolist() == pytest.approx([math.log(9) * 1.9, 1.0])


def test_scores_know_the_step():
    router = md_dit.Router(3, 0.0, torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 3)
    e = [md_dit.waves(torch.tensor([t])) for t in (0, 500)]
    assert e[0].tolist() == [[1.0] * 8] and e[1].shape == (1, 8)
    with torch.no_grad():
        assert torch.equal(router(x, e[0]), router(x, e[1]))                                         # before training
        router.step.weight.fill_(1.0)
        assert not torch.allclose(router(x, e[0]), router(x, e[1]))


def test_the_share_follows_the_phase():
    config = md_dit.Config(early=0.4, late=0.8, switch=0.3)
    assert [md_dit.share_at(t, config) for t in (999, 300, 299, 0)] == [0.4, 0.4, 0.8, 0.8]


# ---- the model --------------------------------------------------------------------------------------------------------

def test_where_all_steps_take_all_tokens_it_is_the_model():
    model, made, x = digits(refresh=1)
    for a, b in zip(run(made, x, [900, 800, 700]), run(model, x, [900, 800, 700]), strict=True):
        assert torch.equal(a, b)


def test_with_all_tokens_and_a_weight_of_one_it_is_the_model():
    model, made, x = digits(torch.float64, early=1.0, late=0.99, bias=60.0)
    found, wanted = run(made, x, [900, 800])[1], run(model, x, [900, 800])[1]
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_each_block_takes_as_many_tokens_as_said_and_the_others_get_what_they_had():
    _, made, x = digits(refresh=4, switch=0.75)
    seen = []
    for block in made.transformer_blocks:
        block.register_forward_pre_hook(lambda m, args: seen.append(None if m.kept is None else m.kept.clone()))
        block.register_forward_hook(lambda m, args, out: seen.append((args[0], out, m.kept.clone())))
        block.inner.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    run(made, x, [900, 800, 700])
    blocks = [seen[i:i + 3] for i in range(0, len(seen), 3)]
    assert [tokens for _, tokens, _ in blocks] == [256] * 6 + [128] * 6 + [192] * 6
    for before, tokens, (given, out, after) in blocks[6:]:
        same = (before == after).all(-1)
        assert same.sum(1).tolist() == [256 - tokens] * 2
        torch.testing.assert_close(out, given + after)


@pytest.mark.parametrize("times, taken", [([900, 800, 700, 600], [256, 128, 128, 256]), ([900, 800, 900], [256, 128, 256]),
                                          ([900, 850, 800, 400], [256, 128, 128, 256]), ([500, 500], [256, 256])])
def test_runs_do_not_leak(times, taken):
    """All tokens are taken first, every third step, where time goes back, and where it jumps."""
    _, made, x = digits(refresh=3)
    found = []
    made.transformer_blocks[0].inner.register_forward_pre_hook(lambda m, args: found.append(args[0].shape[1]))
    run(made, x, times)
    assert found == taken


def test_another_size_or_forget_begins_a_run():
    _, made, x = digits()
    found = []
    made.transformer_blocks[0].inner.register_forward_pre_hook(lambda m, args: found.append(args[0].shape[:2]))
    answer(made, x, 900)
    answer(made, x[:1], 800)
    answer(made, x[:1], 700)
    md_dit.forget(made)
    answer(made, x[:1], 600)
    assert found == [(2, 256), (1, 256), (1, 128), (1, 256)]


def test_samples_do_not_share_what_is_kept():
    _, made, x = digits(torch.float64)
    both = run(made, x, [900, 800, 700])[-1]
    md_dit.forget(made)
    alone = run(made, x[:1], [900, 800, 700])[-1]
    torch.testing.assert_close(both[:1], alone, atol=1e-12, rtol=0)


def test_random_tokens_are_those_of_the_seed():
    outs = [run(digits(choice="random", seed=seed)[1], digits()[2], [900, 800])[1] for seed in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("t, k", [(800, 128), (250, 192)])
def test_what_is_computed_is_the_closed_form(t, k):
    model, made, x = digits()
    answer(made, x, t + 50)
    saved = 6 * 2 * (md_dit.costs(256, 128) - md_dit.costs(k, 128) - 256 * 128) - 6 * 2 * 8
    assert count_macs(lambda: answer(model, x, t)) - count_macs(lambda: answer(made, x, t)) == saved


def test_the_loss_leaves_nothing_behind_and_trains_routers_alone():
    _, made, x = digits()
    noising = Noising(methods.tiny("dit").scheduler)
    found = md_dit.loss(made, noising, x, step=0, random=torch.Generator().manual_seed(0), class_labels=torch.arange(2))
    assert float(found["loss"].detach()) == pytest.approx(float((found["task"] + found["distance"]).detach()))
    found["loss"].backward()
    trained = {name for name, weight in made.named_parameters() if weight.requires_grad}
    assert all(".router." in name for name in trained) and all(
        weight.grad.any() for name, weight in made.named_parameters() if name in trained)
    assert all(block.kept is None and block.share is None for block in made.transformer_blocks) and made.depth.forced is None


# ---- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, named", [
    ({"early": 0.0}, "early=0.0"), ({"late": 1.5}, "late=1.5"), ({"switch": 2.0}, "switch=2.0"), ({"refresh": 0}, "refresh=0"),
    ({"bypass": "other"}, "bypass='other'"), ({"choice": "luck"}, "choice='luck'"), ({"early": float("nan")}, "early=nan")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        md_dit.Config(**wrong)


def test_what_cannot_be_is_refused():
    model, made, x = digits()
    with pytest.raises(ValueError, match="convert it first"):
        md_dit.forget(model)
    made.transformer_blocks[5].set_chunk_feed_forward(64, 1)
    with pytest.raises(RuntimeError, match="switch forward chunking off"):
        answer(made, x)


# ---- what ships -------------------------------------------------------------------------------------------------------

def test_the_shipped_routers_cost_what_the_closed_form_says():
    """Of 20 steps 4 take all tokens; of the others 11 are early, at timesteps of at least 300, and 5 late."""
    pipe, card = methods.tiny("dit"), weights_card("md_dit")["metrics"]
    pipe.transformer = md_dit.convert(pipe.transformer, md_dit.TRAINED["md_dit"])
    md_dit.load(pipe.transformer, methods.weights("md_dit"))
    assert all(block.router.step.weight.abs().max() > 0 for block in pipe.transformer.transformer_blocks)
    early = sum(t >= 300 and i % 5 != 0 for i, t in enumerate(range(999, 0, -50)))
    shares = (4 + early * md_dit.costs(128, 128) / md_dit.costs(256, 128)
              + (16 - early) * md_dit.costs(192, 128) / md_dit.costs(256, 128)) / 20
    assert card["md_dit"]["macs_per_image"] / card["plain"]["macs_per_image"] == pytest.approx(shares, rel=0.02)
    assert card["nothing kept"]["macs_per_image"] == card["md_dit"]["macs_per_image"] == card["random tokens"]["macs_per_image"]
    assert card["md_dit"]["frechet"] < card["random tokens"]["frechet"] < card["nothing kept"]["frechet"]
