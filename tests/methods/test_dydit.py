import authors_dit
import pytest
import torch
from contracts import training
from torch import nn

import methods
from accel_tools.measure.macs import count_macs
from methods import dydit
from methods._core.denoiser import describe
from methods._core.noise import Noising
from methods._trained import weights_card


@pytest.mark.parametrize("check, case", training.cases(dydit), ids=training.name)
def test_contract(check, case):
    check(case)


def routed(bias=0.5, token_bias=0.5, dtype=torch.float32, **more):
    """The converted DiT of digits, and inputs for it."""
    model = methods.tiny("dit").transformer.to(dtype)
    converted = dydit.convert(model, dydit.Config(bias=bias, token_bias=token_bias, **more))
    x = torch.randn(3, 1, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return model, converted, x, torch.tensor([1, 7, 1000])


@torch.no_grad()
def answer(model, x, t, y):
    return model(x, timestep=torch.as_tensor(t).expand(len(x)), class_labels=y).sample


# ---- the equations ----------------------------------------------------------------------------------------------------

def gates(heads, channels, tokens, shape=(2, 3)):
    return dydit.Gates(*(torch.tensor(part, dtype=torch.float64).expand(*shape, -1) for part in (heads, channels, tokens)))


def test_costs_of_the_largest_dit():
    A, M = dydit.costs(256, 1152, 4 * 1152)
    assert (A, M) == (1_509_949_440, 2_717_908_992) and 28 * (A + M) == pytest.approx(118.38e9, rel=1e-4)


def test_share_by_hand():
    A, M = dydit.costs(256, 1152, 4 * 1152)
    half, all_tokens, every_other = [1, 0] * 8, [1] * 256, [1, 0] * 128
    assert dydit.share(gates(half, half, all_tokens), A, M).tolist() == [0.5, 0.5]
    assert dydit.share(gates(half, half, every_other), A, M).tolist() == pytest.approx([0.3393, 0.3393], abs=1e-4)
    assert dydit.share(gates([1] * 16, [1] * 16, all_tokens), A, M).tolist() == [1, 1]


def test_the_target_falls_from_one():
    config = dydit.Config(target=0.5, warmup=1000, delay=100)
    found = [dydit.annealed(step, config) for step in (0, 99, 100, 500, 1000, 5000)]
    assert found == pytest.approx([1, 1, 0.95, 0.75, 0.5, 0.5])
    assert dydit.annealed(1, dydit.Config(target=0.3, warmup=1, delay=0)) == pytest.approx(0.3)


def test_the_penalty_is_that_of_the_mean_share():
    _, model, x, y = routed(target=0.4, weight=3.0, warmup=10, delay=2, complete=4)
    noising = Noising(methods.tiny("dit").scheduler)

    def found(step):
        terms = dydit.loss(model, noising, x, step=step, random=torch.Generator().manual_seed(0), class_labels=y)
        return {name: float(value.detach()) for name, value in terms.items()}
    late = found(99)
    assert late["target"] == pytest.approx(0.4) and late["share"] != pytest.approx(0.4, abs=1e-3)
    assert late["loss"] == pytest.approx(late["dynamic"] + 3 * (late["share"] - 0.4) ** 2)
    early = found(0)
    complete = early["loss"] - early["dynamic"] - 3 * (early["share"] - 1) ** 2
    noisy = noising.sample(x, torch.Generator().manual_seed(0))
    plain = noising.loss(answer(methods.tiny("dit").transformer, noisy.x, noisy.t, y), noisy)
    assert complete == pytest.approx(float(plain), rel=1e-4)
    last, first = found(3), found(4)
    for terms, target in ((last, 0.82), (first, 0.76)):
        assert terms["target"] == pytest.approx(target)
    assert last["loss"] > last["dynamic"] + 3 * (last["share"] - 0.82) ** 2 + 0.5 * complete
    assert first["loss"] == pytest.approx(first["dynamic"] + 3 * (first["share"] - 0.76) ** 2)


# ---- the model --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [3, 500, 990])
def test_all_gates_are_open_at_the_start(t):
    plain, model, x, y = routed(bias=15.0, token_bias=35.0)
    assert torch.equal(answer(model, x, t, y), answer(plain, x, t, y))
    assert dydit.left(model).tolist() == [1, 1, 1]
    assert torch.equal(answer(model, x, [3, 500, 990], y), answer(plain, x, [3, 500, 990], y))


def test_a_sub_network_equals_the_masked_model():
    _, model, x, y = routed(dtype=torch.float64)
    for t in (20, 400, 900):
        sliced = answer(model, x, t, y)
        heads, channels, tokens = dydit.opened(model)
        assert all(0 < part.mean() < 1 for part in (heads, channels, tokens))
        masked = answer(model, torch.cat([x, x[:1]]), [t, t, t, 990 - t], torch.cat([y, y[:1]]))
        torch.testing.assert_close(masked[:3], sliced, atol=1e-10, rtol=1e-10)
        assert torch.equal(dydit.opened(model).tokens[:3], tokens)
        torch.testing.assert_close(masked[3:], answer(model, x[:1], 990 - t, y[:1]), atol=1e-10, rtol=1e-10)


def test_sub_networks_ahead_are_those_of_the_run():
    _, model, x, y = routed()
    times = torch.arange(0, 1000, 90)
    ahead = dydit.subnetworks(model, times)
    assert len(ahead[0].unique(dim=0)) > 1                                     # they change with the timestep
    for i, t in enumerate(times):
        answer(model, x, t, y)
        heads, channels, _ = dydit.opened(model)
        assert all(torch.equal(said, part[i].expand_as(said)) for said, part in zip((heads, channels), ahead, strict=True))


def test_the_first_head_and_group_are_always_on():
    _, model, x, y = routed(bias=-1e3)
    out = answer(model, x, 500, y)
    heads, channels, _ = dydit.opened(model)
    assert heads.sum(-1).eq(1).all() and heads[..., 0].all() and channels.sum(-1).eq(1).all() and channels[..., 0].all()
    assert out.isfinite().all()


def test_a_token_that_passes_by_is_left_bit_for_bit():
    _, model, x, y = routed(token_bias=-1e6)
    streams, ran = [], []
    for block in model.transformer_blocks:
        block.norm3.register_forward_pre_hook(lambda m, args: streams.append(args[0]))
        block.register_forward_hook(lambda m, args, out: streams.append(out))
        block.ff.inner.net[0].register_forward_hook(lambda *_: ran.append(1))
    answer(model, x, 500, y)
    assert all(torch.equal(a, b) for a, b in zip(streams[::2], streams[1::2], strict=True)) and not ran


@pytest.mark.parametrize("t", [100, 800])
def test_what_is_computed_is_what_the_gates_say(t):
    """Closed form: the plain model less the share of its blocks, and the routers themselves."""
    plain, model, x, y = routed()
    full, found = (count_macs(lambda m=m: answer(m, x, t, y)) for m in (plain, model))
    (B, L, N), D, H = dydit.opened(model).tokens.shape, 128, 4
    A, M = dydit.costs(N, D, 4 * D)
    routers = L * (256 * D + D * D + 2 * D * (H - 1)) + B * L * N * (D * (D // 16) + D // 16)
    saved = (1 - dydit.left(model).double()).sum() * L * (A + M)
    assert found - routers == pytest.approx(full - float(saved), rel=1e-6) and found < full


def test_bits_do_not_depend_on_the_batch_around_a_sub_network():
    _, model, x, y = routed(dtype=torch.float64)
    torch.testing.assert_close(answer(model, x, 500, y)[:1], answer(model, x[:1], 500, y[:1]), atol=1e-12, rtol=0)


def test_gradients_reach_every_router_through_the_penalty_alone():
    _, model, x, y = routed(weight=1.0, complete=0)
    with model.routers.under(model, torch.Generator().manual_seed(0)):
        model(x, timestep=torch.tensor([10, 400, 900]), class_labels=y)
        (dydit.left(model).mean() - 0.1).square().backward()
    for name, weight in model.routers.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name
    assert all(weight.grad is None or not weight.grad.any() for name, weight in model.named_parameters()
               if "ff.inner.net.2" in name and name.startswith("transformer_blocks.5"))


# alibaba-damo-academy/DyDiT@0ddc5097d2bc, its DiT with the weights of `authors_dit` and these routers, double precision
OFFICIAL = {900: [0.758959, 0.752180], 700: [0.753094, 0.798215], 500: [0.788197, 0.750295], 300: [0.771644, 0.864288],
            100: [0.770230, 0.879064], 20: [0.752142, 0.831255]}


def test_equals_the_official_code():
    model = dydit.convert(authors_dit.pipeline(layers=2).transformer, dydit.Config())
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            for n, layer in enumerate((router.heads, router.channels, router.tokens[0])):
                wave = torch.sin(torch.arange(layer.weight.numel(), dtype=torch.float64) * 1.3 + n + 2 * i)
                layer.weight.copy_(3 * wave.view(layer.weight.shape))
                nn.init.zeros_(layer.bias)
            nn.init.ones_(router.tokens[2].weight)
            nn.init.constant_(router.tokens[2].bias, -1)
    x = torch.sin(torch.arange(512, dtype=torch.float64)).view(2, 4, 8, 8)
    found = [answer(model, x, t, torch.tensor([3, 10]))[:, 1, 2, 3] for t in OFFICIAL]
    torch.testing.assert_close(torch.stack(found), torch.tensor([*OFFICIAL.values()], dtype=torch.float64), atol=1e-6, rtol=0)


# ---- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, named", [
    ({"target": 0.0}, "target=0.0"), ({"target": 1.5}, "target=1.5"), ({"target": float("nan")}, "target=nan"),
    ({"tau": 0.0}, "tau=0.0"), ({"weight": -1.0}, "weight=-1.0"), ({"warmup": 0}, "warmup=0"), ({"delay": -5}, "delay=-5"),
    ({"complete": -2}, "complete=-2")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        dydit.Config(**wrong)


def test_what_cannot_be_is_refused():
    plain, model, x, y = routed()
    with pytest.raises(ValueError, match="'nowhere' is part of no parameter's name"):
        dydit.convert(plain, dydit.Config(backbone=("nowhere",)))
    with pytest.raises(ValueError, match="not been called yet"):
        dydit.left(model)
    with pytest.raises(ValueError, match="convert it first"):
        dydit.subnetworks(plain, torch.tensor([5]))
    with pytest.raises(ValueError, match="training mode"):
        dydit.loss(model.train(), Noising(methods.tiny("dit").scheduler), x, step=0, random=torch.Generator(), class_labels=y)
    model.eval().enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        dydit.loss(model, Noising(methods.tiny("dit").scheduler), x, step=0, random=torch.Generator(), class_labels=y)
    model.disable_gradient_checkpointing()
    model.transformer_blocks[0].set_chunk_feed_forward(64, 1)
    with pytest.raises(RuntimeError, match="switch chunking off"):
        answer(model, x, 500, y)


# ---- what ships -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", dydit.TRAINED)
def test_the_trained_weights_hold_their_target(name):
    """The share left on digits drawn now is what the card says, near the target, and differs between timesteps."""
    pipe, config = methods.tiny("dit"), dydit.TRAINED[name]
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = dydit.convert(pipe.transformer, config)
    dydit.load(pipe.transformer, methods.weights(name))
    shares = []
    pipe.transformer.register_forward_hook(lambda *_: shares.append(float(dydit.left(pipe.transformer).mean())))
    pipe([3, 1, 4, 1], num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    assert sum(shares) / len(shares) == pytest.approx(config.target, abs=0.06) and max(shares) - min(shares) > 0.02
    assert all(isinstance(block.ff, dydit.Mlp) for block in describe(pipe.transformer).blocks)


@pytest.mark.parametrize("name", dydit.TRAINED)
def test_the_cards_bear_out_the_claim(name):
    """At the cost of its target the digits are as right as plain ones, and nearer to real ones than with fewer steps."""
    card = weights_card(name)["metrics"]
    plain, fewer, found = card["plain"], card["plain, fewer steps"], card["dydit"]
    assert found["macs_per_image"] / plain["macs_per_image"] == pytest.approx(dydit.TRAINED[name].target, abs=0.05)
    assert fewer["macs_per_image"] <= found["macs_per_image"] and fewer["steps"] < found["steps"] == plain["steps"]
    assert found["label_accuracy"] >= 0.98 and found["frechet"] < fewer["frechet"]
