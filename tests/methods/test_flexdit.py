import pytest
import torch
from authors_dit import pipeline
from contracts import training
from torch import nn

import methods
from accel_tools.measure.macs import count_macs
from methods import flexdit
from methods._core.noise import Noising
from methods._trained import weights_card


@pytest.mark.parametrize("check, case", training.cases(flexdit), ids=training.name)
def test_contract(check, case):
    check(case)


def digits(dtype=torch.float32, **config):
    """The DiT of digits, itself converted, and an input of two."""
    model = methods.tiny("dit").transformer.to(dtype)
    x = torch.randn(2, 1, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return model, flexdit.convert(model, flexdit.Config(**{"pooling": 1, "modules": 1, "group": (1, 1, 1, 1)} | config)), x


@torch.no_grad()
def answer(model, x, t=500):
    return model(x, timestep=torch.as_tensor(t).expand(len(x)), class_labels=torch.arange(len(x))).sample


# ---- the equations ----------------------------------------------------------------------------------------------------

def test_costs_of_the_largest_dit():
    """One module of the default group at N = 256, M = 64, D = 1152, worked by hand."""
    found = flexdit.costs(256, 64, 1152)
    assert found["dense"] == 4_227_858_432 and found["generation"] == pytest.approx(1.5666e9, rel=1e-4)
    assert found["sparse"] == pytest.approx(1.0287e9, rel=1e-4) and found["recovery"] == pytest.approx(4.2845e9, rel=1e-4)
    module = flexdit.roles(6, flexdit.Config(pooling=0, modules=1))
    assert sum(found[role] for role in module) == pytest.approx(13.165e9, rel=1e-4)


def test_roles_of_the_largest_dit():
    found = flexdit.roles(28, flexdit.Config())
    module = ["generation", "sparse", "sparse", "sparse", "recovery", "dense"]
    assert found == ["pooling"] * 2 + module * 4 + ["dense"] * 2
    with pytest.raises(ValueError, match="are 26 blocks; the model has 25"):
        flexdit.roles(25, flexdit.Config())


def test_the_side_grows_after_a_quarter_of_the_steps():
    found = [flexdit.side_at(k / 40, 6, 10) for k in range(40)]
    assert found[:10] == [6] * 10 and found[-1] == 10 and sorted(found) == found and set(found) == {6, 7, 8, 9, 10}
    assert {flexdit.side_at(k / 40, 8, 8) for k in range(40)} == {8}


def test_pooling_and_widening_by_hand():
    x = torch.arange(8.0).view(1, 8, 1)                                                        # two rows of four
    assert flexdit.pool(x, (2, 4), (1, 2)).flatten().tolist() == [2.5, 4.5]
    assert flexdit.widen(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), (2, 2), (3, 4)).flatten().tolist() == \
        [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4]                                                   # row floor(i 2 / 3)
    assert torch.equal(flexdit.pool(x, (2, 4), (2, 4)), x) and torch.equal(flexdit.widen(x, (2, 4), (2, 4)), x)


def test_the_mean_of_the_values_is_what_uniform_attention_gives():
    attn = methods.tiny("dit").transformer.double().transformer_blocks[0].attn1
    x = torch.randn(2, 9, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = flexdit.Pooling(attn)(x)
    for layer in (attn.to_q, attn.to_k):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    torch.testing.assert_close(found, attn(x), atol=1e-12, rtol=0)
    assert torch.equal(found, found[:, :1].expand_as(found))


# ---- the model --------------------------------------------------------------------------------------------------------

def test_at_the_whole_side_only_the_pooled_block_differs():
    """Querying the map from the map is its attention, and the merge keeps the map, so a module without worked-on tokens
    computes what its blocks did, but that the recovered map is the one at the entry."""
    model, made, x = digits(torch.float64, pooling=0, group=(1, 0, 1, 0), side=16)
    seen = []
    model.transformer_blocks[0].register_forward_hook(lambda *args: seen.append(args[2]))
    made.transformer_blocks[0].register_forward_hook(lambda *args: seen.append(args[2]))
    answer(model, x)
    answer(made, x)
    torch.testing.assert_close(*seen, atol=1e-12, rtol=0)


def test_the_merge_gives_the_map_at_first():
    _, made, x = digits()
    recovery, entered = made.transformer_blocks[3], []
    made.transformer_blocks[1].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    recovery.inner.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    answer(made, x)
    assert isinstance(recovery, flexdit.Recovery) and torch.equal(entered[1][:, :256], entered[0])
    assert entered[1].shape[1] == 256 + 64 and made.density.full is None


@pytest.mark.parametrize("config", [{}, {"group": (1, 0, 1, 0), "modules": 2}, {"group": (2, 1, 1, 1), "side": 5}])
def test_what_is_computed_is_the_closed_form(config):
    model, made, x = digits(**config)
    cost = flexdit.costs(256, made.density.config.side ** 2, 128)
    saved = sum(cost["dense"] - cost[role] for role in flexdit.roles(6, made.density.config))
    assert count_macs(lambda: answer(model, x)) - count_macs(lambda: answer(made, x)) == len(x) * saved > 0


def test_the_grid_grows_over_the_steps_of_a_run():
    pipe, sides = methods.tiny("dit"), []
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = made = digits(side=4, last_side=12)[1]
    made.register_forward_hook(lambda *_: sides.append(made.density.sparse))
    pipe([3], num_inference_steps=8, generator=torch.Generator().manual_seed(0))
    assert sides[0] == (4, 4) and sides[-1] == (11, 11) and sides == sorted(sides) and len(set(sides)) > 4


def test_a_batch_of_training_has_one_side():
    _, made, x = digits(side=4, last_side=12)
    noising, found = Noising(methods.tiny("dit").scheduler), set()
    made.register_forward_pre_hook(lambda m, args, kwargs: found.add(tuple(
        flexdit.side_at(1 - (float(t) + 1) / 1000, 4, 12) for t in kwargs["timestep"])), with_kwargs=True)
    for seed in range(4):
        flexdit.loss(made, noising, x, step=0, random=torch.Generator().manual_seed(seed), class_labels=torch.arange(2))
    assert all(len(set(sides)) == 1 for sides in found) and len(found) > 1


def test_a_grid_that_is_not_square_keeps_its_shape():
    from contracts.patch import FAMILIES
    pipe = FAMILIES["pixart"].pipe()
    pipe.transformer = made = flexdit.convert(pipe.transformer, flexdit.TINY)
    out = FAMILIES["pixart"].run(pipe, steps=1, size=(32, 48))
    assert made.density.dense == (8, 12) and made.density.sparse == (3, 4) and out.isfinite().all()


# changsn/SparseDiT@fc6917b9eea6, its DiT with the weights of `authors_dit` and these merges, double precision
OFFICIAL = {900: [0.8261366, 1.1201921], 500: [0.7082529, 1.0908491], 100: [0.5756171, 0.8263008], 20: [0.4817430, 0.9210422]}


def test_equals_the_official_code():
    """With merges that are not those of the start."""
    made = flexdit.convert(pipeline(layers=6).transformer, flexdit.Config(pooling=1, modules=1, group=(1, 1, 1, 1), side=2))
    with torch.no_grad():
        for n, layer in enumerate((made.transformer_blocks[3].from_sparse, made.transformer_blocks[3].from_dense)):
            layer.weight.copy_(0.2 * torch.sin(torch.arange(256, dtype=torch.float64) * 1.3 + n).view(16, 16))
        x = torch.sin(torch.arange(512, dtype=torch.float64)).view(2, 4, 8, 8)
        found = [made(x, timestep=torch.tensor([t, t]), class_labels=torch.tensor([3, 10])).sample for t in OFFICIAL]
    found = [each[:, 1, 2, 3] for each in found]
    torch.testing.assert_close(torch.stack(found), torch.tensor([*OFFICIAL.values()], dtype=torch.float64), atol=1e-6, rtol=0)


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, named", [
    ({"pooling": -1}, "pooling=-1"), ({"modules": -1}, "modules=-1"), ({"group": (0, 1, 1, 1)}, "group="),
    ({"side": 0}, "side=0"), ({"group": (1, 1, 0, 1)}, "group="), ({"side": 8, "last_side": 6}, "last_side=6")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        flexdit.Config(**wrong)


def test_what_cannot_be_is_refused():
    model, made, x = digits()
    with pytest.raises(ValueError, match="'nowhere' is part of no parameter's name"):
        digits(tuned=("nowhere",))
    with pytest.raises(ValueError, match="training mode"):
        flexdit.loss(made.train(), Noising(methods.tiny("dit").scheduler), x, step=0, random=torch.Generator())
    made.eval().transformer_blocks[5].set_chunk_feed_forward(64, 1)
    with pytest.raises(RuntimeError, match="switch forward chunking off"):
        answer(made, x)


# ---- what ships -------------------------------------------------------------------------------------------------------

def test_the_shipped_parts_cost_what_the_closed_form_says():
    card, cost = weights_card("flexdit")["metrics"], flexdit.costs(256, 64, 128)
    blocks = [sum(cost[role] for role in flexdit.roles(6, config)) for config in
              (flexdit.OFF, flexdit.TRAINED["flexdit"], flexdit.RIVALS["flexdit"]["one module"])]
    for row, blocks_of in ((card["flexdit"], blocks[1]), (card["one module"], blocks[2])):
        assert row["macs_per_image"] / card["plain"]["macs_per_image"] == pytest.approx(blocks_of / blocks[0], rel=0.02)
    pipe = methods.tiny("dit")
    pipe.transformer = flexdit.convert(pipe.transformer, flexdit.TRAINED["flexdit"])
    flexdit.load(pipe.transformer, methods.weights("flexdit"))
    assert methods.weights("flexdit").stat().st_size <= 2_000_000
    assert any(block.from_sparse.weight.abs().max() > 0.01 for block in pipe.transformer.transformer_blocks
               if isinstance(block, flexdit.Recovery))
