import pytest
import torch
from contracts import compress
from torch import nn

import methods
from accel_tools.measure.macs import count_macs
from accel_tools.measure.trained import drop_in
from methods import diff_pruning
from methods._core.denoiser import describe
from methods._core.noise import Noising
from methods._trained import weights_card


@pytest.mark.parametrize("check, case", compress.cases(diff_pruning), ids=compress.name)
def test_contract(check, case):
    check(case)


def digits(dtype=torch.float32):
    """The DiT of digits with its gradients on, noise, and a batch."""
    pipe = methods.tiny("dit")
    x0 = torch.rand(2, 1, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return pipe.transformer.to(dtype).requires_grad_(True), Noising(pipe.scheduler), x0, {"class_labels": torch.tensor([3, 8])}


def pruned(dtype=torch.float32, **config):
    model, noising, x0, conditions = digits(dtype)
    return model, diff_pruning.compress(model, diff_pruning.Config(levels=4, **config), noising, [(x0, conditions)]), x0


@torch.no_grad()
def answer(model, x, t=500):
    return model(x, timestep=torch.full((len(x),), t), class_labels=torch.tensor([3, 8])).sample


# ---- the equations ----------------------------------------------------------------------------------------------------

def one_channel(w, g, criterion):
    """The score of one channel with two weights."""
    layer = nn.Linear(2, 1)
    layer.weight.data, layer.weight.grad = torch.tensor([w]), torch.tensor([g])
    group = diff_pruning.Group(tuple(diff_pruning.rows(layer)))
    return float(diff_pruning.scores(group, diff_pruning.Config(criterion=criterion), torch.Generator()))


def test_the_three_sums_by_hand():
    found = [one_channel([2.0, 1.0], [0.1, -0.4], rule) for rule in ("squares", "absolute", "signed", "magnitude")]
    assert found == pytest.approx([0.20, 0.6, 0.2, 5.0])


def test_how_many_channels_stay():
    score = torch.arange(512.0)
    assert len(diff_pruning.kept(score, 0.3)) == int(512 * 0.7) and diff_pruning.kept(score, 0.3)[0] == 154
    norm_groups = diff_pruning.kept(torch.rand(128, generator=torch.Generator().manual_seed(0)), 0.3, within=32)
    assert len(norm_groups) == 96 and (norm_groups // 4).bincount().tolist() == [3] * 32
    assert diff_pruning.kept(torch.tensor([3.0, 1.0, 2.0, 0.5, 9.0, 8.0]), 0.5, within=2).tolist() == [0, 2, 4, 5] and \
        diff_pruning.kept(score[:4], 0.0).tolist() == [0, 1, 2, 3]


def test_gradients_are_those_of_the_sum_of_the_losses():
    model, noising, x0, conditions = digits(torch.float64)
    config = diff_pruning.Config(levels=3, threshold=0.0, seed=7)
    losses = diff_pruning.accumulate(model, config, noising, x0, conditions)
    found = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    total = 0
    for t in (166, 500, 833):                                         # of a thousand, in the middle of each third
        noisy = noising.sample(x0, torch.Generator().manual_seed(7), torch.full((2,), t))
        total = total + diff_pruning.error(noising, model(noisy.x, timestep=noisy.t, **conditions).sample, noisy)
    total.backward()
    assert sum(losses) == pytest.approx(float(total.detach())) and len(losses) == 3
    for a, b in zip(found, (weight.grad for weight in model.parameters() if weight.grad is not None), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_all_levels_of_the_scheduler_are_looked_at_once():
    noising = digits()[1]
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(noising.process.t(u), torch.arange(1000))


def test_the_error_is_that_of_the_noise_whatever_is_predicted():
    _, noising, x0, _ = digits()
    noisy = noising.sample(x0, torch.Generator().manual_seed(0), torch.tensor([100, 700]))
    assert float(diff_pruning.error(noising, noisy.target, noisy)) < 1e-10
    a, _ = noising.levels(noisy.t, x0)
    found = diff_pruning.error(noising, noisy.target + 0.1, noisy)    # an error of v is one of the noise a times as large
    assert float(found) == pytest.approx(float((0.1 * a).square().mean()), rel=1e-4)


def test_the_threshold_ends_the_sum():
    model, noising, x0, conditions = digits()

    def used(threshold):
        return len(diff_pruning.accumulate(model, diff_pruning.Config(levels=6, threshold=threshold), noising, x0, conditions))
    losses = diff_pruning.accumulate(model, diff_pruning.Config(levels=6, threshold=0.0), noising, x0, conditions)
    first = next(i for i, loss in enumerate(losses) if loss < 0.5 * max(losses[:i + 1]))
    assert used(0.5) == first and 1 <= first < len(losses) == 6


# ---- the model --------------------------------------------------------------------------------------------------------

def test_channels_of_zeros_go_without_a_trace():
    """Queries and keys, values and outputs, and hidden channels, of which the last quarter is zero in every range."""
    model, noising, x0, conditions = digits(torch.float64)
    plain = answer(model, x0)
    with torch.no_grad():
        for group in diff_pruning.groups(model):
            width = group.size // group.within
            dead = torch.arange(group.size).view(group.within, width)[:, width * 3 // 4:].flatten()
            for module, name, axis, _ in group.parts:
                getattr(module, name).index_fill_(axis, dead, 0)
    zeroed = answer(model, x0)
    made = diff_pruning.compress(model, diff_pruning.Config(ratio=0.25, criterion="magnitude"), noising, [])
    assert made.transformer_blocks[0].attn1.to_q.out_features == 96
    torch.testing.assert_close(answer(made, x0), zeroed, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(zeroed, plain)


def test_what_stays_is_what_the_scores_say():
    """Independently: on the copy that is scored, hidden channels by the sum of squares over both layers."""
    model, noising, x0, conditions = digits()
    config = diff_pruning.Config(levels=4)
    made = diff_pruning.compress(model, config, noising, [(x0, conditions)])
    diff_pruning.accumulate(model, config, noising, x0, conditions)
    for block, cut in zip(model.transformer_blocks, made.transformer_blocks, strict=True):
        up, down = block.ff.net[0].proj.weight, block.ff.net[2].weight
        score = (up * up.grad).square().sum(1) + (down * down.grad).square().sum(0)
        stay = score.topk(358).indices.sort().values
        assert torch.equal(cut.ff.net[2].weight, down[:, stay]) and torch.equal(cut.ff.net[0].proj.weight, up[stay])


def test_macs_of_the_closed_form():
    """39 of 128 channels of heads go, 9 of each head, and 154 of 512 hidden ones."""
    plain, made, x = pruned()
    saved = count_macs(lambda: answer(plain, x)) - count_macs(lambda: answer(made, x))
    B, L, N, D = 2, 6, 256, 128
    assert saved == pytest.approx(B * L * (4 * N * D * 36 + 2 * N * N * 36 + 2 * N * D * 154), rel=1e-6)


def test_random_channels_are_those_of_the_seed():
    _, made, _ = pruned(criterion="random", seed=1)
    _, again, _ = pruned(criterion="random", seed=1)
    _, other, _ = pruned(criterion="random", seed=2)
    first = [model.transformer_blocks[0].ff.net[2].weight for model in (made, again, other)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_only_what_is_named_is_tuned_and_saved(tmp_path):
    model, made, x = pruned(tuned=("attn1.", "ff."))
    names = {name for name, weight in made.named_parameters() if weight.requires_grad}
    assert names and all(".attn1." in name or ".ff." in name for name in names)
    diff_pruning.save(made, tmp_path / "part.safetensors", torch.float16)
    again = diff_pruning.load(model, tmp_path / "part.safetensors")
    assert {name for name, weight in again.named_parameters() if weight.requires_grad} == names
    torch.testing.assert_close(answer(again, x), answer(made, x), atol=0.02, rtol=0.02)
    other = methods.tiny("unet").unet
    with pytest.raises(ValueError, match="part.safetensors holds .* which this"):
        diff_pruning.load(other, tmp_path / "part.safetensors")


@pytest.mark.slow
def test_before_tuning_the_score_does_better_than_others():
    """By the loss on other drawn digits than those that were looked at."""
    pipe, labels = methods.tiny("dit"), torch.arange(10)
    pipe.set_progress_bar_config(disable=True)
    images = [pipe(labels.tolist(), num_inference_steps=5, output_type="np",
                   generator=torch.Generator().manual_seed(seed)).images for seed in (0, 1)]
    drawn = [torch.as_tensor(each).movedim(-1, 1) * 2 - 1 for each in images]
    noising, losses = Noising(pipe.scheduler), {}
    noisy = noising.sample(drawn[1], torch.Generator().manual_seed(0))
    for rule in ("squares", "random", "magnitude"):
        made = diff_pruning.compress(pipe.transformer, diff_pruning.Config(levels=10, criterion=rule), noising,
                                     [(drawn[0], {"class_labels": labels})])
        with torch.no_grad():
            losses[rule] = float(noising.loss(made(noisy.x, noisy.t, labels).sample, noisy))
    assert 1.2 * losses["squares"] < losses["random"] < losses["magnitude"]


@pytest.mark.parametrize("wrong, named", [
    ({"ratio": 1.0}, "ratio=1.0"), ({"ratio": float("nan")}, "ratio=nan"), ({"threshold": 1.0}, "threshold=1.0"),
    ({"levels": 0}, "levels=0"), ({"criterion": "luck"}, "criterion='luck' is none of squares")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        diff_pruning.Config(**wrong)


def test_a_name_that_no_parameter_has_is_refused():
    with pytest.raises(ValueError, match="'nowhere' is part of no parameter's name"):
        pruned(tuned=("nowhere",))


# ---- what ships -------------------------------------------------------------------------------------------------------

def test_the_shipped_weights_are_as_narrow_as_said():
    model = drop_in(diff_pruning, "diff_pruning")
    for block in describe(model).blocks:
        assert block.attn.to_q.out_features == 92 and block.attn.heads == 4 and block.ff.net[-1].in_features == 358
    assert methods.weights("diff_pruning").stat().st_size <= 2_000_000
    card, (N, D) = weights_card("diff_pruning")["metrics"], (256, 128)
    block = 12 * N * D ** 2 + 2 * N ** 2 * D
    share = 1 - (4 * N * D * 36 + 2 * N ** 2 * 36 + 2 * N * D * 154) / block
    assert card["diff_pruning"]["macs_per_image"] / card["plain"]["macs_per_image"] == pytest.approx(share, rel=0.02)
    assert {card[name]["macs_per_image"] for name in ("random channels", "smallest magnitude")} == {
        card["diff_pruning"]["macs_per_image"]}
