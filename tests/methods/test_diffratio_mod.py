import pytest
import torch
from contracts import training

import methods
from accel_tools.measure.macs import count_macs
from methods import diffratio_mod
from methods._core.noise import Noising
from methods._trained import weights_card


@pytest.mark.parametrize("check, case", training.cases(diffratio_mod), ids=training.name)
def test_contract(check, case):
    check(case)


def digits(dtype=torch.float32, **config):
    """The DiT of digits, itself converted, and an input of two."""
    model = methods.tiny("dit").transformer.to(dtype)
    x = torch.randn(2, 1, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return model, diffratio_mod.convert(model, diffratio_mod.Config(**config)), x


@torch.no_grad()
def answer(model, x, t=500):
    return model(x, timestep=torch.as_tensor(t).expand(len(x)), class_labels=torch.arange(len(x))).sample


# ---- the equations ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N, tenths, k", [(10, 7, 7), (10, 8, 8), (64, 3, 20), (64, 10, 64), (5, 1, 1), (1000, 7, 700)])
def test_how_many_tokens_are_kept(N, tenths, k):
    w = torch.rand(2, N, generator=torch.Generator().manual_seed(0))
    at = diffratio_mod.kept(w, tenths)
    assert at.shape == (2, k) and (at.diff(dim=1) > 0).all()
    assert torch.equal(w.gather(1, at).sort(dim=1).values, w.sort(dim=1).values[:, N - k:])


@pytest.mark.parametrize("rho, weights", [(0.78, {7: 0.2, 8: 0.8}), (0.88, {8: 0.2, 9: 0.8}), (0.8, {8: 1.0, 9: 0.0}),
                                          (1.0, {9: 0.0, 10: 1.0}), (0.1, {1: 1.0, 2: 0.0}), (0.25, {2: 0.5, 3: 0.5})])
def test_the_mix_by_hand(rho, weights):
    outputs = {tenths: torch.randn(4, generator=torch.Generator().manual_seed(tenths)) for tenths in weights}
    found = diffratio_mod.mixed(torch.tensor(rho), outputs.__getitem__)
    torch.testing.assert_close(found, sum(part * outputs[tenths] for tenths, part in weights.items()), atol=1e-6, rtol=0)
    if 1.0 in weights.values():                                                          # on a bin: bit for bit
        assert torch.equal(found, next(outputs[tenths] for tenths, part in weights.items() if part == 1))


def test_the_gradient_of_a_share_is_the_difference_of_the_outputs():
    _, model, x = digits(torch.float64, start=0.73)
    routed = model.transformer_blocks[2]
    given = {"timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([1, 2])}
    tokens = torch.randn(2, 64, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def mean(rho):
        routed.rho = rho
        return routed(tokens, **given).square().mean()
    rho = torch.tensor(0.73, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(mean(rho), rho)
    with torch.no_grad():
        numeric = (mean(rho + 1e-3) - mean(rho - 1e-3)) / 2e-3
    assert float(slope) == pytest.approx(float(numeric), rel=1e-3) and abs(float(slope)) > 1e-6


def test_shares_move_from_where_they_start():
    """The clamp of the released pseudo-code gives a share of 1 no gradient."""
    _, model, x = digits(target=0.5)
    noising = Noising(methods.tiny("dit").scheduler)
    diffratio_mod.loss(model, noising, x, step=0, random=torch.Generator().manual_seed(0),
                       class_labels=torch.arange(2))["loss"].backward()
    assert (model.shares.shares.grad != 0).all()
    with torch.no_grad():
        model.shares.shares.fill_(1.4)
    assert (model.shares.rho() == 1).all() and model.shares.rho().requires_grad


def test_the_penalty_is_on_the_mean_of_all_shares():
    _, model, x = digits(target=0.6, weight=3.0, start=0.8)
    with torch.no_grad():
        model.shares.shares[0] -= 0.12                                                   # of six blocks
    noising, found = Noising(methods.tiny("dit").scheduler), []
    for weight in (3.0, 0.0):
        object.__setattr__(model.shares.config, "weight", weight)
        found.append(diffratio_mod.loss(model, noising, x, step=0, random=torch.Generator().manual_seed(0),
                                        class_labels=torch.arange(2)))
    assert float(found[0]["share"].detach()) == pytest.approx(0.78, abs=1e-6)
    assert float(found[0]["loss"].detach() - found[1]["loss"].detach()) == pytest.approx(3 * 0.18 ** 2, rel=1e-3)


# ---- the model --------------------------------------------------------------------------------------------------------

def test_with_a_weight_of_one_and_all_tokens_it_is_the_model():
    model, made, x = digits(torch.float64, bias=50.0)
    torch.testing.assert_close(answer(made, x), answer(model, x), atol=1e-12, rtol=0)
    halved = digits(torch.float64, bias=0.0)[1]
    assert not torch.allclose(answer(halved, x), answer(model, x), atol=1e-3)


def test_tokens_that_pass_by_are_left_bit_for_bit():
    _, made, x = digits(start=0.3)
    seen = []
    for routed in made.transformer_blocks:
        routed.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
    answer(made, x)
    for routed, given, out in seen:
        at = diffratio_mod.kept(routed.router(given)[..., 0].sigmoid(), 3)
        same = (given == out).all(-1)
        assert at.shape[1] == 77 and not same.gather(1, at).any() and same.sum(1).tolist() == [256 - 77] * 2


def test_a_token_that_passes_by_says_nothing_to_the_others():
    _, made, x = digits(torch.float64, start=0.5)
    routed, given = made.transformer_blocks[1], {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
    routed.rho, tokens = 5, torch.randn(1, 64, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        w = routed.router(tokens)[..., 0]
        out, low = routed(tokens, **given), w[0].argmin()
        changed = tokens.clone()
        changed[0, low] -= 0.1 * routed.router.weight[0] / routed.router.weight.norm()   # even less likely to be kept
        again = routed(changed, **given)
    keep = torch.arange(64) != low
    assert torch.equal(out[0, keep], again[0, keep]) and torch.equal(again[0, low], changed[0, low])


def test_routers_learn_through_the_weights_of_kept_tokens_alone():
    _, made, x = digits(start=0.5)
    routed, given = made.transformer_blocks[1], {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
    routed.rho, tokens = 5, torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0))
    routed(tokens, **given).square().sum().backward()
    assert routed.router.weight.grad.any()
    routed.router.zero_grad()
    linear = routed.inner.norm1.linear                                                   # gate of the MLP: the last sixth
    with torch.no_grad():
        linear.weight[-128:] = 0
        linear.bias[-128:] = 0
    routed(tokens, **given).square().sum().backward()
    assert not routed.router.weight.grad.any()


@pytest.mark.parametrize("start", [0.3, 0.8])
def test_what_is_computed_is_the_closed_form(start):
    model, made, x = digits(start=start)
    k = -(-round(start * 10) * 256 // 10)
    saved = 6 * 2 * (diffratio_mod.costs(256, 128) - diffratio_mod.costs(k, 128))
    routers = 6 * 2 * 256 * 128
    assert count_macs(lambda: answer(model, x)) - count_macs(lambda: answer(made, x)) == saved - routers


def test_each_range_of_timesteps_has_its_share():
    _, made, x = digits(regions=4)
    with torch.no_grad():
        made.shares.shares.copy_(torch.tensor([0.2, 0.4, 0.6, 0.8]).expand(6, 4))
    for t, tenths in ((0, 2), (249, 2), (250, 4), (750, 8), (999, 8)):
        answer(made, x, t)
        assert [block.rho for block in made.transformer_blocks] == [tenths] * 6
    answer(made, x, [10, 600])
    assert made.transformer_blocks[0].rho == 6


def test_uniform_shares_stay():
    _, made, _ = digits(start=0.7, learnt=False, tuned=("net.2",))
    trains = {name for name, weight in made.named_parameters() if weight.requires_grad}
    assert "shares.shares" not in trains and any("router" in name for name in trains)
    assert torch.equal(diffratio_mod.rounded(made), torch.full((6, 4), 0.7))


# ---- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, named", [
    ({"target": 0.0}, "target=0.0"), ({"target": 1.2}, "target=1.2"), ({"start": 0.05}, "start=0.05"),
    ({"regions": 0}, "regions=0"), ({"weight": -1.0}, "weight=-1.0"), ({"target": float("nan")}, "target=nan")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        diffratio_mod.Config(**wrong)


def test_what_cannot_be_is_refused():
    model, made, x = digits()
    with pytest.raises(ValueError, match="convert it first"):
        diffratio_mod.rounded(model)
    with pytest.raises(ValueError, match="'nowhere' is part of no parameter's name"):
        digits(tuned=("nowhere",))
    made.transformer_blocks[5].set_chunk_feed_forward(64, 1)
    with pytest.raises(RuntimeError, match="switch forward chunking off"):
        answer(made, x)


# ---- what ships -------------------------------------------------------------------------------------------------------

def test_the_shipped_shares_hold_their_target():
    config = diffratio_mod.TRAINED["diffratio_mod"]
    model = diffratio_mod.convert(methods.tiny("dit").transformer, config)
    diffratio_mod.load(model, methods.weights("diffratio_mod"))
    shares = diffratio_mod.rounded(model)
    assert abs(float(shares.mean()) - config.target) <= 0.03 and len(shares.unique()) > 1
    card = weights_card("diffratio_mod")["metrics"]
    assert card["diffratio_mod"]["frechet"] < card["uniform share"]["frechet"]
    blocks = torch.tensor([[diffratio_mod.costs(-(-round(float(rho) * 10) * 256 // 10), 128) for rho in row] for row in shares])
    share = float(blocks.double().mean()) / diffratio_mod.costs(256, 128)                # steps are even over the ranges
    assert card["diffratio_mod"]["macs_per_image"] / card["plain"]["macs_per_image"] == pytest.approx(share, rel=0.02)
