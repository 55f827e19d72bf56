import pytest
import torch
from contracts import training

import methods
from accel_tools.measure.macs import count_macs
from methods import mco
from methods._core.noise import Noising
from methods._trained import weights_card


@pytest.mark.parametrize("check, case", training.cases(mco), ids=training.name)
def test_contract(check, case):
    check(case)


def digits(dtype=torch.float32, **config):
    """The DiT of digits, itself converted, and an input of two."""
    model = methods.tiny("dit").transformer.to(dtype)
    x = torch.randn(2, 1, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return model, mco.convert(model, mco.Config(**config)), x


@torch.no_grad()
def answer(model, x, t=500):
    return model(x, timestep=torch.as_tensor(t).expand(len(x)), class_labels=torch.arange(len(x))).sample


class Seen(torch.nn.Module):
    """In the place of an attention: gives what it is given."""

    def forward(self, x):
        self.given = x
        return x


# ---- the design -------------------------------------------------------------------------------------------------------

def test_the_share_follows_the_third_of_the_clock():
    config = mco.Config(early=0.5, middle=0.3, late=0.1)
    assert [mco.ratio_at(t, config) for t in (1000, 999, 667, 666, 334, 333, 0)] == [0.5, 0.5, 0.5, 0.3, 0.3, 0.1, 0.1]


def test_equal_tokens_merge_without_a_trace_and_others_to_their_mean():
    merged = mco.Merged(Seen())
    merged.grid, merged.ratio = (1, 2, 4), 0.25                                       # two of six sources
    x = torch.eye(8)[None].repeat(2, 1, 1)
    x[:, 1], x[:, 5] = x[:, 0], x[:, 0]                                               # equal to the destination at 0
    assert torch.equal(merged(x), x) and merged.inner.given.shape == (2, 6, 8)
    x[:, 1] = torch.tensor([3.0, 0.1, 0, 0, 0, 0, 0, 0])
    out = merged(x)
    torch.testing.assert_close(out[:, 1], (x[:, 0] + x[:, 5] + x[:, 1]) / 3)
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 2:5], x[:, 2:5])


@pytest.mark.parametrize("ratio, rows", [(0.5, 128), (0.3, 180), (0.1, 231), (0.9, 64), (0.0, 256)])
def test_how_many_tokens_stay(ratio, rows):
    merged = mco.Merged(Seen())
    merged.grid, merged.ratio = (1, 16, 16), ratio
    merged(torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(0)))
    assert merged.inner.given.shape[1] == rows


# ---- the model --------------------------------------------------------------------------------------------------------

def test_a_stage_that_merges_nothing_is_the_model():
    model, made, x = digits(late=0.0)
    assert torch.equal(answer(made, x, 100), answer(model, x, 100)) and not torch.equal(answer(made, x), answer(model, x))


def test_of_different_stages_the_one_that_merges_fewest_counts():
    _, made, x = digits()
    answer(made, x, [900, 100])
    assert {block.attn1.ratio for block in made.transformer_blocks} == {0.1}


@pytest.mark.parametrize("t, rows", [(900, 128), (500, 180), (100, 231)])
def test_what_is_computed_is_the_closed_form(t, rows):
    """The matching compares 192 sources with 64 destinations."""
    model, made, x = digits()
    saved = mco.costs(256, 256, 128) - mco.costs(rows, 256, 128) - 192 * 64 * 128
    assert count_macs(lambda: answer(model, x, t)) - count_macs(lambda: answer(made, x, t)) == 6 * 2 * saved


def test_without_a_stage_the_distance_to_the_teacher_is_none():
    model, made, x = digits(early=0.01, middle=0.0, late=0.0)
    noising, found = Noising(methods.tiny("dit").scheduler), []
    for seed in range(8):
        terms = mco.loss(made, noising, x, step=0, random=torch.Generator().manual_seed(seed), teacher=model,
                         class_labels=torch.arange(2))
        found.append((made.transformer_blocks[0].attn1.ratio, float(terms["distance"].detach())))
        assert float(terms["loss"].detach()) == pytest.approx(float((terms["task"] + terms["distance"]).detach()))
    assert all((ratio == 0) == (distance == 0) for ratio, distance in found) and {ratio for ratio, _ in found} == {0.0, 0.01}


def test_gradients_pass_the_merge():
    _, made, x = digits(early=0.5, middle=0.5, late=0.5)
    mco.loss(made, Noising(methods.tiny("dit").scheduler), x, step=0, random=torch.Generator().manual_seed(0),
             class_labels=torch.arange(2))["loss"].backward()
    assert all(block.attn1.to_q.weight.grad.any() and block.attn1.to_v.weight.grad.any() for block in made.transformer_blocks)


def test_a_narrower_model_can_be_converted():
    from methods import diff_pruning
    pipe = methods.tiny("dit")
    narrow = diff_pruning.compress(pipe.transformer, diff_pruning.Config(criterion="magnitude"), Noising(pipe.scheduler), [])
    made, x = mco.convert(narrow), digits()[2]
    assert count_macs(lambda: answer(made, x)) < count_macs(lambda: answer(narrow, x)) and answer(made, x).isfinite().all()


# ---- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, named", [
    ({"early": 1.0}, "early=1.0"), ({"middle": -0.1}, "middle=-0.1"), ({"late": float("nan")}, "late=nan"),
    ({"stride": 1}, "stride=1"), ({"distance": -1.0}, "distance=-1.0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        mco.Config(**wrong)


def test_a_cell_larger_than_the_grid_is_refused():
    _, made, x = digits(stride=20)
    with pytest.raises(ValueError, match="stride=20 is more than the grid"):
        answer(made, x)


# ---- what ships -------------------------------------------------------------------------------------------------------

def test_the_shipped_parts_cost_what_the_stages_say():
    pipe, card = methods.tiny("dit"), weights_card("mco")["metrics"]
    pipe.transformer = mco.convert(pipe.transformer, mco.TRAINED["mco"])
    mco.load(pipe.transformer, methods.weights("mco"))
    whole = mco.costs(256, 256, 128)
    for name, config in (("mco", mco.TRAINED["mco"]), ("equal stages", mco.RIVALS["mco"]["equal stages"])):
        rows = [256 - int(256 * mco.ratio_at(t, config)) for t in range(999, 0, -50)]
        share = sum(mco.costs(each, 256, 128) + 192 * 64 * 128 for each in rows) / len(rows) / whole
        assert card[name]["macs_per_image"] / card["plain"]["macs_per_image"] == pytest.approx(share, rel=0.02)
    assert card["mco"]["macs_per_image"] == pytest.approx(card["equal stages"]["macs_per_image"], rel=0.02)
