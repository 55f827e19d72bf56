import pytest
import torch
from contracts import patch as contract
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from families import FAMILIES, Family

from methods import easycache
from methods.easycache import Config, Known, expected, rate, reused

SAMPLED = ["unet", "dit", "pixart", "sd3", "flux", "latte", "cogvideox", "wan", "wan-i2v", "svd"]


@pytest.mark.parametrize("check, case", contract.cases(easycache, easycache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def test_worked_example():
    x = [torch.tensor([[value]]) for value in (4.0, 3.0, 2.8, 2.5)]
    first = Known(x[0], x[0], torch.tensor([[2.0]]))
    assert expected(first, x[1]) is None
    v = torch.tensor([[1.5]])
    known = Known(x[1], x[1], v, rate(first, x[1], v))
    assert known.rate == pytest.approx(0.5)
    assert expected(known, x[2]) == pytest.approx(0.5 * 0.2 / 1.5)
    assert reused(x[2], known).item() == pytest.approx(1.3)
    assert expected(known._replace(before=x[2]), x[3]) == pytest.approx(0.1)            # from the call before, computed or not


def test_of_a_linear_model_the_rate_is_its_slope_and_scale_does_not_matter():
    random = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(1, 3, 5, 7, generator=random) for _ in range(3))
    known = Known(x, x, -0.3 * x + 2)
    k = rate(known, y, -0.3 * y + 2)
    assert k == pytest.approx(0.3, rel=1e-5)
    now = Known(y, y, -0.3 * y + 2, k)
    assert expected(now, z) == pytest.approx(0.3 * float((z - y).abs().mean()) / float(now.v.abs().mean()), rel=1e-5)
    scaled = Known(8 * y, 8 * y, 8 * now.v, rate(Known(8 * x, 8 * x, 8 * known.v), 8 * y, 8 * now.v))
    assert expected(scaled, 8 * z) == pytest.approx(expected(now, z))


def test_what_did_not_move_has_no_rate_and_computes():
    x = torch.ones(1, 2)
    assert rate(Known(x, x, x), x, 2 * x) is None
    assert expected(Known(x, x, x), x) is None
    assert expected(Known(x, x, 0 * x, 1.0), 2 * x) is None
    assert expected(Known(x, x, x, 1.0), x) == 0.0


def test_what_the_model_gives_besides_is_kept():
    x, v = torch.rand(2, 3, 4, 4), torch.rand(2, 6, 4, 4)
    out = reused(x + 1, Known(x, x, v, 1.0))
    torch.testing.assert_close(out[:, :3], v[:, :3] + 1)
    assert torch.equal(out[:, 3:], v[:, 3:])


def by_hand(family, pipe, config, steps):
    """The run with the model called, or not, by a loop of its own. -> (result, steps computed)"""
    model, calls, state, ran = Family.model(pipe), [], {}, []
    forward, per_step = model.forward, 2 if family.name.startswith("wan") else 1
    name = "sample" if hasattr(model, "down_blocks") else "hidden_states"

    def cond(value):
        return value if len(value) == 1 else value[:1] if family.name == "dit" else value[1:]

    def call(*args, **kwargs):
        i, half = divmod(len(calls), per_step)
        calls.append(1)
        x = args[0] if args else kwargs[name]
        mine = state.setdefault(half, {})
        if half == 0:
            due = True
            if config.warmup <= i < steps - 1 and "k" in mine:
                own = tuple(map(slice, mine["x"].shape))
                mine["sum"] += mine["k"] * cond(x[own] - mine["before"]).abs().mean() / cond(mine["v"][own]).abs().mean()
                due = not mine["sum"] < config.threshold
            state["due"] = due
        if state["due"]:
            out = forward(*args, **kwargs)[0]
            own = tuple(map(slice, map(min, x.shape, out.shape)))
            if "x" in mine:
                mine["k"] = cond(out[own] - mine["v"][own]).abs().mean() / cond(x[own] - mine["x"]).abs().mean()
            mine |= {"x": x[own].clone(), "v": out.clone(), "sum": 0.0}
            ran.append(i)
        else:
            own = tuple(map(slice, mine["x"].shape))
            out = mine["v"].clone()
            out[own] = x[own] + (mine["v"][own] - mine["x"])
        mine["before"] = x[own].clone()
        return Transformer2DModelOutput(sample=out)

    model.forward = call
    return family.run(pipe, steps=steps), ran


@pytest.mark.slow
@pytest.mark.parametrize("threshold, warmup", [(0.9, 2), (2.0, 3)])
@pytest.mark.parametrize("name", SAMPLED)
def test_whole_runs_are_those_of_a_loop(name, threshold, warmup):
    family, config = FAMILIES[name], Config(threshold=threshold, warmup=warmup)
    with easycache.apply(pipe := family.pipe(), config) as patch:
        ours = family.run(pipe, steps=11)
        report = patch.report()
    theirs, ran = by_hand(family, family.pipe(), config, 11)
    assert report["state"] == "engaged" and report["computed"] == len(ran)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_second_call_of_guidance_follows_the_first():
    pipe, ran = FAMILIES["wan"].pipe(), []
    Family.model(pipe).patch_embedding.register_forward_hook(lambda *args: ran.append(1))
    with easycache.apply(pipe, Config(threshold=0.9, warmup=2)) as patch:
        FAMILIES["wan"].run(pipe, steps=9)
        report = patch.report()
    assert report["computed"] == len(ran) and len(ran) % 2 == 0 and 0 < report["reused"] == 18 - len(ran)


def test_nothing_of_the_model_runs_in_a_step_left_out():
    pipe, ran = FAMILIES["dit"].pipe(), {"embed": 0, "tail": 0}
    pipe.transformer.pos_embed.register_forward_hook(lambda *args: ran.__setitem__("embed", ran["embed"] + 1))
    pipe.transformer.norm_out.register_forward_hook(lambda *args: ran.__setitem__("tail", ran["tail"] + 1))
    with easycache.apply(pipe, Config(threshold=1e9, warmup=0)) as patch:
        FAMILIES["dit"].run(pipe, steps=7)
        assert patch.report()["computed"] == 3                    # two until a rate is known, and the last
    assert ran == {"embed": 3, "tail": 3}


def test_the_first_steps_and_the_last_compute():
    pipe = FAMILIES["dit"].pipe()
    with easycache.apply(pipe, Config(threshold=1e9, warmup=3)) as patch:
        for steps, computed in ((1, 1), (3, 3), (4, 4), (7, 4)):
            out = FAMILIES["dit"].run(pipe, steps=steps)
            assert patch.report()["computed"] == computed
            assert steps > 4 or torch.equal(out, contract.plain("dit", steps=steps))
        FAMILIES["dit"].run(pipe, steps=3)
        assert patch.report()["reason"] == "the first 3 steps, and the last, always compute"


def test_a_threshold_that_is_always_reached_says_what_it_saw():
    pipe = FAMILIES["dit"].pipe()
    with easycache.apply(pipe, Config(threshold=1e-6, warmup=2)) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe), contract.plain("dit", steps=4))
        assert "reached 1e-06 in every step; the smallest change expected was " in patch.report()["reason"]


def test_cost_falls_and_distance_grows_along_the_threshold():
    configs = (Config(threshold=threshold, warmup=2) for threshold in (1e-6, 0.4, 1.0, 1e9))
    assert contract.costs_fall_and_distances_grow(easycache, configs)[-1] == 3


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        easycache.apply(FAMILIES["dit"].pipe().transformer)
    with pytest.raises(ValueError, match="several latents in one call"):
        easycache.apply(FAMILIES["ltx2"].pipe())


@pytest.mark.parametrize("bad", [{"threshold": -0.1}, {"warmup": -1}])
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match="must not be negative"):
        Config(**bad)
