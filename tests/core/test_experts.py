"""A pipeline with several denoisers: each is patched, steps are counted once, and a patch speaks for all of them."""
import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from methods import fora, pfdiff, teacache, tome
from methods._core.context import Expert

WAN = FAMILIES["wan22"]
STEPS = 9


def twins(boundary):
    """Two experts of equal weights, or the first alone for all steps."""
    pipe = WAN.pipe()
    pipe.transformer_2.load_state_dict(pipe.transformer.state_dict())
    pipe.register_to_config(boundary_ratio=boundary)
    return pipe


@pytest.mark.parametrize("method, config", [
    (tome, tome.Config()), (pfdiff, pfdiff.Config()), (pfdiff, pfdiff.Config(k=2, h=2))])
def test_two_experts_of_equal_weights_are_one_model(method, config):
    """For what keeps nothing from step to step, or keeps it at the scheduler."""
    with method.apply(one := twins(None), config) as alone:
        expected = WAN.run(one, steps=STEPS)
    with method.apply(two := twins(0.7), config) as both:
        assert torch.equal(WAN.run(two, steps=STEPS), expected)
        assert both.report() == alone.report() and both.report()["state"] == "engaged"
    assert torch.equal(WAN.run(two, steps=STEPS), WAN.run(twins(0.7), steps=STEPS))


def test_every_expert_caches_for_itself():
    """The second one computes when it is first called, in the middle of the run."""
    pipe, ran = WAN.pipe(), {"transformer": [], "transformer_2": []}
    steps = []
    with fora.apply(pipe, fora.Config(interval=2, count_from="start")) as patch:
        for name, seen in ran.items():
            model = getattr(pipe, name)
            model.blocks[0].attn1.to_q.register_forward_hook(lambda *_, seen=seen: seen.append(steps[-1]))
        for each in (patch, *patch.also):
            each.each_call(lambda context: steps.append(context.i))
        for each in (patch, *patch.also):                             # told of the step before anything runs
            each._before.insert(0, each._before.pop())
        WAN.run(pipe, steps=STEPS)
        assert patch.report()["computed"] + patch.report()["reused"] == 2 * STEPS * 3 * 3
    first, second = (sorted(set(seen)) for seen in ran.values())
    assert first and second and max(first) < min(second)
    assert first == [i for i in range(second[0]) if i % 2 == 0]
    assert second[1:] == [i for i in range(second[0] + 1, STEPS) if i % 2 == 0]


@pytest.mark.parametrize("method", contract.patches(), ids=contract.slug)
def test_all_experts_or_none(method, monkeypatch):
    """What fails on the second leaves the first as it was."""
    pipe = WAN.pipe()
    plain, apply, met = WAN.run(pipe, steps=2), contract.Patch.on, []

    def on(patch):
        met.append(patch)
        if len(met) == 2:
            raise KeyError("in the second")
        return apply(patch)

    monkeypatch.setattr(contract.Patch, "on", on)
    with pytest.raises((KeyError, ValueError)):
        method.apply(pipe, contract.engaging(method))
    assert not any("_patch_site" in vars(module) for module in (*pipe.transformer.modules(), *pipe.transformer_2.modules()))
    assert torch.equal(WAN.run(pipe, steps=2), plain)


def test_one_expert_may_be_patched_alone():
    pipe = WAN.pipe()
    with tome.apply(Expert(pipe, "transformer_2")) as patch:
        WAN.run(pipe, steps=STEPS)
        assert 0 < patch.report()["merged"] < 3 * 2 * STEPS and not patch.also
        assert "_patch_site" not in vars(pipe.transformer)


def test_a_limit_holds_for_all_of_them():
    pipe, config = WAN.pipe(), teacache.TINY
    with teacache.apply(pipe, config) as patch:
        WAN.run(pipe, steps=STEPS)
        whole = patch.report()["cached_bytes"]
        patch.limit(bytes=whole // 2)
        WAN.run(pipe, steps=STEPS)
        assert patch.report()["cached_bytes"] <= whole // 2
        patch.limit(bytes=0)
        WAN.run(pipe, steps=STEPS)
        assert patch.report()["cached_bytes"] == 0 and patch.report()["state"] == "no gain"


@pytest.mark.parametrize("wrong", [0.5, fora.Config(), None, "fast"])
def test_another_second_argument_is_named_before_anything_is_done(wrong):
    pipe = WAN.pipe()
    with pytest.raises(TypeError, match=r"config must be a methods\.tome\.Config, not "):
        tome.apply(pipe, wrong)
    with tome.apply(pipe):
        pass


def test_an_expert_that_is_replaced_under_a_patch_is_noticed():
    pipe = WAN.pipe()
    with tome.apply(pipe):
        pipe.transformer_2 = WAN.pipe().transformer_2
        with pytest.raises(RuntimeError, match="was replaced under a patch"):
            WAN.run(pipe, steps=STEPS)
