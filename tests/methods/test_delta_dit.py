import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import delta_dit
from methods._core.denoiser import describe
from methods.delta_dit import Config

CHAINED = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]


@pytest.mark.parametrize("check, case", contract.cases(delta_dit, delta_dit.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("count_from, outline", [("start", 12), ("end", 8)])
def test_stages_of_twenty_steps(count_from, outline):
    """b = 12 by either reading: 12 steps of outline and 8 of detail, or 8 and 12."""
    found = [delta_dit.stage(i, 20, Config(count_from=count_from)) for i in range(20)]
    assert found == [(True, i) for i in range(outline)] + [(False, i) for i in range(20 - outline)]


def test_both_readings_agree_on_four_steps_and_a_switch_of_two():
    assert [delta_dit.stage(i, 4, Config(switch=2, count_from="start")) for i in range(4)] == [
        delta_dit.stage(i, 4, Config(switch=2, count_from="end")) for i in range(4)]


def test_spans():
    assert delta_dit.span(28, 0.75, True) == range(7, 28) and delta_dit.span(28, 0.75, False) == range(21)
    assert delta_dit.span(28, 1, True) == delta_dit.span(28, 1, False) == range(28)
    assert not delta_dit.span(28, 0, True) and not delta_dit.span(28, 0, False)


def left_out(depth, steps, config):
    """Indices of the blocks that do not run, step by step."""
    found = []
    for i in range(steps):
        outline, number = delta_dit.stage(i, steps, config)
        found.append(set(delta_dit.span(depth, config.share, outline)) if number % config.interval else set())
    return found


@pytest.mark.parametrize("steps, switch, share, ran", [(20, 12, 21 / 28, 350), (4, 2, 4 / 28, 104), (4, 2, 6 / 28, 100)])
def test_cost_of_28_blocks(steps, switch, share, ran):
    """The reported speed-ups: 560 / 350 = 1.6 in 20 steps; of a consistency model 112 / 104 = 1.08 and 112 / 100 = 1.12."""
    assert 28 * steps - sum(map(len, left_out(28, steps, Config(share=share, switch=switch)))) == ran


def met(modules):
    """In which order the forward of these modules really runs, below whatever patches they carry."""
    order = []
    for i, module in enumerate(modules):
        module.register_forward_hook(lambda *_, i=i: order.append(i))
    return order


@pytest.mark.parametrize("name", CHAINED)
def test_what_runs(name):
    """Rear blocks are left out early and front blocks late; the first step of a stage runs all."""
    family, config = FAMILIES[name], Config(interval=3, share=0.5, switch=4)
    pipe = family.pipe()
    model = Family.model(pipe)
    blocks = describe(model).blocks
    order, starts = met([block.norm for block in blocks]), []
    model.register_forward_pre_hook(lambda *_: starts.append(len(order)))
    with delta_dit.apply(pipe, config) as patch:
        family.run(pipe, steps=7)
        report = patch.report()
    first, count = len(blocks) - round(len(blocks) / 2), round(len(blocks) / 2)
    whole, front, rear = list(range(len(blocks))), list(range(first)), list(range(count, len(blocks)))
    calls = [order[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert calls == [whole, front, front, whole, whole, rear, rear]
    assert report["computed"] == len(order) and report["skipped"] == 7 * len(blocks) - len(order)


def by_hand(pipe, plan):
    """Blocks of one stream whose run follows `plan`: for each step a range (start, stop) and whether it is left out."""
    blocks = Family.model(pipe).transformer_blocks
    step, kept = [-1], {}

    def wrap(i, forward):
        def run(x, **more):
            step[0] += i == 0
            (start, stop), skip = plan[step[0]]
            if skip and start <= i < stop:
                return x + kept["delta"] if i == start else x
            if i == start:
                kept["in"] = x
            out = forward(x, **more)
            if i == stop - 1:
                kept["delta"] = out - kept["in"]
            return out
        return run
    for i, block in enumerate(blocks):
        block.forward = wrap(i, block.forward)
    return pipe


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_whole_runs_equal_a_program_by_hand(name):
    family, rear, front = FAMILIES[name], (1, 5), (0, 4)
    plan = [(rear, False), (rear, True), (rear, False), (front, False), (front, True), (front, False), (front, True)]
    for size in family.sizes:
        pipe = family.pipe(layers=5)
        with delta_dit.apply(pipe, Config(share=0.8, switch=3)):
            ours = family.run(pipe, steps=7, size=size, batch=2)
        assert torch.equal(ours, family.run(by_hand(family.pipe(layers=5), plan), steps=7, size=size, batch=2))


@pytest.mark.parametrize("interval, share, switch", [(2, 0.5, 2), (3, 1.0, 4), (5, 0.75, 0)])
def test_blocks_that_add_a_constant_lose_nothing(interval, share, switch):
    def toy():
        pipe = FAMILIES["dit"].pipe(layers=4)
        for i, block in enumerate(pipe.transformer.transformer_blocks):
            block.forward = lambda x, i=i, **_: x + (i + 1) / 8
        return pipe
    pipe = toy()
    with delta_dit.apply(pipe, Config(interval=interval, share=share, switch=switch)) as patch:
        out = FAMILIES["dit"].run(pipe, steps=6)
        assert patch.report()["skipped"] > 0
    torch.testing.assert_close(out, FAMILIES["dit"].run(toy(), steps=6), atol=1e-5, rtol=1e-5)


def test_with_all_blocks_in_the_range_only_embedding_and_head_run():
    pipe = FAMILIES["pixart"].pipe()
    model = pipe.transformer
    order = met([model.pos_embed, model.proj_out, *(layer for block in model.transformer_blocks for layer in block.modules()
                                                    if isinstance(layer, torch.nn.Linear))])
    with delta_dit.apply(pipe, Config(share=1.0)):
        FAMILIES["pixart"].run(pipe, steps=2)
    assert order[-2:] == [0, 1] and order.count(0) == order.count(1) == 2
    assert all(order.count(i) == 1 for i in set(order) - {0, 1})


def test_the_stages_differ_in_what_they_keep():
    family, outs = FAMILIES["dit"], []
    for switch in (0, 6):                                          # all detail, all outline
        pipe = family.pipe()
        with delta_dit.apply(pipe, Config(share=0.5, switch=switch)):
            outs.append(family.run(pipe, steps=6))
    assert not torch.equal(*outs)


def test_one_tensor_is_kept_for_the_range():
    pipe = FAMILIES["dit"].pipe(layers=8)
    with delta_dit.apply(pipe, Config()) as patch:
        FAMILIES["dit"].run(pipe, steps=4)
        assert patch.report()["cached_bytes"] == 2 * 64 * 32 * 4   # both halves of guidance, 8 x 8 tokens, float32


@pytest.mark.parametrize("wrong, named", [({"interval": 0}, "interval=0"), ({"share": 1.5}, "share=1.5"),
                                          ({"switch": -1}, "switch=-1"), ({"count_from": "middle"}, "count_from='middle'")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_an_empty_range_is_off():
    assert delta_dit.apply(FAMILIES["dit"].pipe(), Config(share=0)).off


def test_what_cannot_be_served_is_refused():
    pipe = FAMILIES["dit"].pipe()
    with pytest.raises(ValueError, match="no range of share=0.1"):
        delta_dit.apply(pipe, Config(share=0.1))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        delta_dit.apply(pipe.transformer, Config(count_from="end"))
    with pytest.raises(ValueError, match="on a UNet use deepcache"):
        delta_dit.apply(FAMILIES["unet"].pipe())
    model = FAMILIES["sd3"].pipe().transformer
    text = torch.zeros(1, 5, 16)
    with delta_dit.apply(model), pytest.raises(ValueError, match="run without one"):
        model(torch.zeros(1, 4, 16, 16), text, text[:, 0], torch.tensor([10.0]), block_controlnet_hidden_states=[text])
