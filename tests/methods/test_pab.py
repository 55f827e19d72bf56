import pytest
import torch
import two_calls
from contracts import patch as contract
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from families import FAMILIES, FIRST, Family

from methods import pab
from methods._core.denoiser import describe
from methods.pab import Config

LATTE = tuple(float(t) for t in range(980, -1, -20))          # the timesteps of 50 steps


@pytest.mark.parametrize("check, case", contract.cases(pab, pab.Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("by", ["timestep", "step"])
def test_schedule_of_fifty_steps(by):
    """Steps 10 to 43 lie in the window (100, 800): 17, 23 and 28 of them are broadcasts of ranges 2, 3 and 6."""
    times = pab.clock(LATTE, by)
    found = {n: [i for i in range(50) if pab.broadcasts(i, times[i], n, (100, 800))] for n in (1, 2, 3, 6)}
    assert found[1] == [] and found[2] == list(range(11, 44, 2))
    assert found[3] == [i for i in range(10, 44) if i % 3] and len(found[3]) == 23
    assert found[6] == [i for i in range(10, 44) if i not in (12, 18, 24, 30, 36, 42)] and len(found[6]) == 28


def test_bounds_are_outside():
    assert [pab.broadcasts(1, t, 2, (100, 800)) for t in (100, 100.5, 799.5, 800)] == [False, True, True, False]
    assert not any(pab.broadcasts(1, t, 2, (500, 500)) for t in LATTE)


def test_on_shifted_timesteps_the_window_may_be_measured_in_steps():
    shifted = (1000.0, 960.0, 900.0, 750.0, 300.0)
    assert pab.clock(shifted, "step") == [800, 600, 400, 200, 0] and pab.clock(shifted, "timestep") == list(shifted)


def test_keys_of_mlps():
    held = pab.broadcasts_mlp(list(LATTE), pab.LATTE_MLP, 2)
    assert [LATTE[i] for i in range(50) if held[i]] == [700, 680, 620, 600, 540, 520, 460, 440, 380, 360]
    assert pab.broadcasts_mlp([900, 600, 300, 0], (620, 280), 2) == [False, False, False, True]      # the nearest steps
    assert pab.broadcasts_mlp([900, 600, 300], (950, 100), 1) == [False] * 3
    assert pab.broadcasts_mlp([900, 600, 300, 0], (900, 600), 3) == [False, False, True, True]       # a key computes


def ran(family, config, steps, **setting):
    """Name of each attention and MLP -> the steps in which its first layer runs."""
    pipe, step, found = family.pipe(), [-1], {}
    model = family.model(pipe)
    model.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    for block in describe(model).blocks:
        kind = "temporal" if block.temporal else "spatial"
        for name, part in ((kind, block.attn), ("cross", block.cross), (f"{kind} MLP", block.ff)):
            if part is not None:
                first = next(module for module in part.modules() if isinstance(module, torch.nn.Linear))
                found.setdefault(name, []).append([])
                first.register_forward_hook(lambda m, a, out, seen=found[name][-1]: seen.append(step[0]))
    with pab.apply(pipe, config) as patch:
        family.run(pipe, steps=steps, **setting)
        return found, patch.report()["cached_bytes"]


def test_each_kind_of_attention_has_its_range():
    found, _ = ran(FAMILIES["latte"], Config(), 50)
    for name, n, count in (("spatial", 2, 17), ("temporal", 3, 23), ("cross", 6, 28)):
        computed = [i for i in range(50) if not pab.broadcasts(i, LATTE[i], n, (100, 800))]
        assert found[name] == [computed] * 2 and len(computed) == 50 - count
    assert found["spatial MLP"] == found["temporal MLP"] == [list(range(50))] * 2


def test_mlps_of_the_first_blocks_are_broadcast_from_the_keys_on_and_then_freed():
    only = Config(spatial=1, temporal=1, cross=1, mlp=pab.LATTE_MLP, mlp_blocks=1)
    found, kept = ran(FAMILIES["latte"], only, 50)
    held = pab.broadcasts_mlp(list(LATTE), pab.LATTE_MLP, 2)
    for kind in ("spatial MLP", "temporal MLP"):
        assert found[kind] == [[i for i in range(50) if not held[i]], list(range(50))]
    assert found["spatial"] == found["cross"] == [list(range(50))] * 2 and kept == 0


def test_what_is_given_again_is_what_was_kept():
    pipe, gave = FAMILIES["cogvideox"].pipe(), []
    pipe.transformer.transformer_blocks[1].attn1.register_forward_hook(lambda m, args, out: gave.append(out))
    with pab.apply(pipe, Config(spatial=3, window=(100, 850))):
        FAMILIES["cogvideox"].run(pipe, steps=8)
    times = [875, 750, 625, 500, 375, 250, 125, 0]
    for i, t in enumerate(times):
        again = i % 3 > 0 and 100 < t < 850
        assert (gave[i][0] is gave[i - 1][0] and gave[i][1] is gave[i - 1][1]) == again, i


@pytest.mark.parametrize("name", ["dit", "pixart", "cogvideox"])
def test_a_gate_is_that_of_the_step_at_hand(name):
    """Attention that gives a constant is broadcast without loss, whatever its gate does."""
    def flat(pipe):
        for block in describe(Family.model(pipe)).blocks:
            block.attn.register_forward_hook(
                lambda m, args, out: tuple(map(torch.ones_like, out)) if isinstance(out, tuple) else torch.ones_like(out))
            block.attn.to_out[0].weight.zero_()
            block.attn.to_out[0].bias.fill_(0.5)
        return pipe
    family = FAMILIES[name]
    pipe = flat(family.pipe())
    with pab.apply(pipe, Config(spatial=2, cross=1)) as patch:
        out = family.run(pipe, steps=6)
        assert patch.report()["broadcast"] > 0
    torch.testing.assert_close(out, family.run(flat(family.pipe()), steps=6))


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("config", [Config(window=(500, 500)), Config(window=(0, 0), mlp=(2000.0,)),
                                    Config(window=(1001, 2000))])
def test_an_empty_window_is_the_plain_run(name, config):
    pipe = FAMILIES[name].pipe()
    with pab.apply(pipe, config) as patch:
        assert torch.equal(FAMILIES[name].run(pipe, steps=4), contract.plain(name, steps=4))
        assert "outside the window" in patch.report()["reason"]


def by_hand(pipe, plan):
    """Attentions and MLPs that repeat what they gave last, in the steps of `plan` (kind -> steps)."""
    model, step = Family.model(pipe), [-1]

    def repeating(module, steps):
        forward, last = module.forward, []

        def run(*args, **kwargs):
            if step[0] not in steps:
                last[:] = [forward(*args, **kwargs)]
            return last[0]
        module.forward = run

    model.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    for block in describe(model).blocks:
        repeating(block.attn, plan["temporal" if block.temporal else "spatial"])
        if block.cross is not None:
            repeating(block.cross, plan["cross"])
    return pipe


@pytest.mark.parametrize("name", ["unet", "dit", "pixart", "latte", "flux", "cogvideox"])
def test_whole_runs_equal_a_program_by_hand(name):
    family, config = FAMILIES[name], Config(spatial=2, temporal=4, cross=3, window=(150, 900))
    for size in family.sizes:
        pipe, times = family.pipe(), []
        with pab.apply(pipe, config) as patch:
            patch.each_call(lambda context, times=times: times.append(context.t))
            ours = family.run(pipe, steps=9, size=size, batch=2, seed=3)
        plan = {kind: [i for i, t in enumerate(times) if i % n and 150 < t < 900]
                for kind, n in (("spatial", 2), ("temporal", 4), ("cross", 3))}
        assert all(plan.values())
        assert torch.equal(ours, family.run(by_hand(family.pipe(), plan), steps=9, size=size, batch=2, seed=3))


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "cogvideox", "latte"])
@pytest.mark.parametrize("n, cross, window", [(2, 6, (100, 800)), (3, 2, (50, 951))])
def test_equals_the_hook_of_diffusers(name, n, cross, window):
    """Which takes temporal blocks for spatial ones."""
    family, setting = FAMILIES[name], dict(steps=11, size=FAMILIES[name].sizes[1], batch=2, seed=5)
    pipe = family.pipe()
    with pab.apply(pipe, Config(spatial=n, temporal=n, cross=cross, window=window)):
        ours = family.run(pipe, **setting)
    pipe = family.pipe()
    scale = 1 / describe(pipe.transformer).row.clock(1, None, 1000)           # of the timestep to what the model is told
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: setattr(pipe, "now", float(kwargs["timestep"].flatten()[0]) * scale), with_kwargs=True)
    apply_pyramid_attention_broadcast(pipe.transformer, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=n, cross_attention_block_skip_range=cross,
        spatial_attention_timestep_skip_range=window, cross_attention_timestep_skip_range=window,
        current_timestep_callback=lambda: pipe.now))
    theirs = family.run(pipe, **setting)
    assert torch.equal(ours, theirs) and not torch.equal(ours, family.run(family.pipe(), **setting))


@pytest.mark.parametrize("name", ["dit", "cogvideox"])
def test_guidance_in_two_calls_gives_the_same(name):
    """Each branch has outputs of its own."""
    (one, report), (two, _) = two_calls.both(pab, Config(spatial=3), name)
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    assert report["broadcast"] > 0 and not torch.allclose(one, two_calls.Sampler(name, 1)(), atol=1e-3)


@pytest.mark.parametrize("wrong, named", [({"spatial": 0}, "spatial=0"), ({"temporal": 0}, "temporal=0"),
                                          ({"cross": -1}, "cross=-1"), ({"by": "sigma"}, "by='sigma'"),
                                          ({"mlp_blocks": -1}, "mlp_blocks=-1"), ({"mlp_skip": -1}, "mlp_skip=-1")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    pipe = FAMILIES["dit"].pipe()
    with pytest.raises(ValueError, match="that these ranges concern"):
        pab.apply(pipe, Config(spatial=1))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        pab.apply(pipe.transformer)
    assert pab.apply(pipe, Config(spatial=1, temporal=1, cross=1, mlp=(500.0,), mlp_skip=0)).off
