import itertools
import json

import numpy as np
import pytest
import torch
from contracts import patch as contract
from diffusers import DDIMScheduler
from families import FAMILIES, Family
from sequential import in_two_calls

from accel_tools.measure.macs import count_macs
from methods import autodiffusion
from methods._core.denoiser import describe
from methods._core.solver import DDIMGrid
from methods.autodiffusion import SIX, Config, cost, cross, legal, mutate, random_plan, skip_range


@pytest.mark.parametrize("check, case", contract.cases(autodiffusion, autodiffusion.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


# ---- the run ----------------------------------------------------------------------------------------------------------

class ByHand(DDIMScheduler):
    """DDIM with eta = 0 over the timesteps of a plan, in Python's numbers; it says before each call what is left out."""

    def follow(self, plan, parts):
        self.plan, self.parts, self.forwards = dict(plan), parts, [part.forward for part, _ in parts]
        return self

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = torch.tensor(sorted(self.plan, reverse=True))

    def scale_model_input(self, x, t):
        for n, (part, past) in enumerate(self.parts):
            part.forward = past if n in self.plan[int(t)] else self.forwards[n]
        return x

    def step(self, eps, t, x, **_):
        later = [other for other in self.plan if other < t]
        a, b = float(self.alphas_cumprod[int(t)]), float(self.alphas_cumprod[max(later)]) if later else 1.0
        return (b ** 0.5 * (x - (1 - a) ** 0.5 * eps) / a ** 0.5 + (1 - b) ** 0.5 * eps,)


def unet_layers(unet):
    """(module, what goes past it), in the order of the network."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for block in blocks:
        for i, resnet in enumerate(block.resnets):
            yield resnet, lambda x, *_, r=resnet, **k: r.conv_shortcut(x) if r.conv_shortcut is not None else x
            if i < len(getattr(block, "attentions", ())):
                yield block.attentions[i], lambda x, *_, **k: (x,)


def pixart_layers(model):
    for block in model.transformer_blocks:
        for part in (block.attn1, block.attn2, block.ff):
            yield part, lambda x, *_, **k: x * 0


@pytest.mark.parametrize("name, layers", [("unet", unet_layers), ("pixart", pixart_layers)])
def test_whole_runs_equal_a_program_by_hand(name, layers):
    family, random = FAMILIES[name], np.random.default_rng(3)
    for steps, size in ((2, family.sizes[0]), (4, family.sizes[1]), (7, family.sizes[0])):
        pipe, other = family.pipe(), family.pipe()
        Family.model(pipe).double()
        parts = list(layers(Family.model(other).double()))
        plan = [(int(t), random.permutation(len(parts))[:3].tolist()) for t in random.permutation(1000)[:steps]]
        pipe.scheduler = DDIMScheduler(clip_sample=False)
        other.scheduler = ByHand(clip_sample=False).follow(plan, parts)
        with autodiffusion.apply(pipe, Config(plan=plan)) as patch:
            ours = family.run(pipe, steps=steps, size=size, batch=2)
            assert patch.report()["skipped"] == 3 * steps
        torch.testing.assert_close(ours, family.run(other, steps=steps, size=size, batch=2), atol=1e-9, rtol=1e-9)


def test_evenly_spaced_steps_are_those_of_the_library():
    """Where the plan holds the timesteps of a plain run, and leaves nothing out, it is that run."""
    for name in ("unet", "pixart"):
        family, pipe = FAMILIES[name], FAMILIES[name].pipe()
        pipe.scheduler.set_timesteps(10)
        plan = [(t, ()) for t in pipe.scheduler.timesteps.tolist()]
        Family.model(pipe).double()
        other = family.pipe()
        Family.model(other).double()
        with autodiffusion.apply(pipe, Config(plan=plan)) as patch:
            torch.testing.assert_close(family.run(pipe, steps=10), family.run(other, steps=10), atol=1e-5, rtol=1e-5)
            assert "its timesteps are others" in patch.report()["reason"]


def test_steps_of_a_flow():
    """Timestep t of 1000 is the noise level (t + 1) / 1000."""
    pipe, seen = FAMILIES["sd3"].pipe(), []
    pipe.transformer.time_text_embed.register_forward_pre_hook(lambda m, args: seen.append(float(args[0][0])))
    with autodiffusion.apply(pipe, Config(plan=[(999, []), (499, []), (99, [])])):
        FAMILIES["sd3"].run(pipe, steps=3)
    assert seen == [1000.0, 500.0, 100.0]
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.5, 0.1, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "latte", "unet"])
def test_what_is_left_out_does_not_run(name):
    family, plan = FAMILIES[name], ((900, (0, 1, 2)), (500, ()), (100, (1, 4)))
    pipe = family.pipe()
    denoiser = describe(Family.model(pipe))
    assert denoiser.blocks
    costs = {}
    for n in {layer for _, skipped in plan for layer in skipped}:
        with autodiffusion.apply(pipe, Config(plan=[(900, []), (500, [n])])):
            costs[n] = -count_macs(lambda pipe=pipe: family.run(pipe, steps=2))
        with autodiffusion.apply(pipe, Config(plan=[(900, []), (500, [])])):
            costs[n] += count_macs(lambda pipe=pipe: family.run(pipe, steps=2))
    assert all(value > 0 for value in costs.values())
    with autodiffusion.apply(pipe, Config(plan=[(t, ()) for t, _ in plan])):
        whole = count_macs(lambda: family.run(pipe, steps=3))
    with autodiffusion.apply(pipe, Config(plan=plan)):
        found = count_macs(lambda: family.run(pipe, steps=3))
    assert whole - found == sum(costs[n] for _, skipped in plan for n in skipped)


def test_leaving_out_all_layers_leaves_the_head_on_the_embedding():
    pipe, heads = FAMILIES["dit"].pipe(), []
    pipe.transformer.norm_out.register_forward_pre_hook(lambda m, args: heads.append(args[0]))
    embeds = []
    pipe.transformer.pos_embed.register_forward_hook(lambda m, args, out: embeds.append(out))
    with autodiffusion.apply(pipe, Config(plan=[(900, range(6)), (400, range(6))])):
        FAMILIES["dit"].run(pipe, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(heads, embeds, strict=True)) and len(heads) == 2


def test_a_plan_for_another_number_of_steps_is_read_in_proportion():
    plan = ((900, (1,)), (500, ()), (100, (2, 3)))
    assert autodiffusion.read(plan, 3) == plan
    assert autodiffusion.read(plan, 5) == ((900, (1,)), (700, (1,)), (500, ()), (300, ()), (100, (2, 3)))
    assert autodiffusion.read(plan, 1) == ((900, (1,)),) and autodiffusion.read(plan, 2) == ((900, (1,)), (100, ()))
    with pytest.raises(ValueError, match="would fall on one timestep"):
        autodiffusion.read(((10, ()), (5, ())), 20)


def test_guidance_in_two_calls_gives_the_same():
    outs = []
    for twice in (False, True):
        pipe = FAMILIES["unet"].pipe()
        pipe.unet.double()
        with autodiffusion.apply(pipe, autodiffusion.TINY):
            if twice:
                in_two_calls(pipe)
            outs.append(FAMILIES["unet"].run(pipe, steps=6))
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-6)


def test_betas_by_hand():
    """A step of the subset {0, 2} of abar = (.9, .5, .1) is that of betas .1 and .8889, whose product of 1 - beta is .1."""
    kept = [0.9, 0.1]
    betas = [1 - kept[0], 1 - kept[1] / kept[0]]
    assert betas == pytest.approx([0.1, 0.8889], abs=1e-4) and (1 - betas[0]) * (1 - betas[1]) == pytest.approx(0.1)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])
    scheduler.timesteps = torch.tensor([2, 0])
    grid = DDIMGrid(scheduler)
    ratios = [1 - float(grid.alphas[i] / grid.alphas[i + 1]) for i in range(2)]
    assert ratios == pytest.approx(betas[::-1], abs=1e-6)


# ---- the search -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_random_plans_use_the_budget(seed):
    random = np.random.default_rng(seed)
    for layers, budget, share in ((10, 40, (0.0, 0.0)), (10, 40, (0.0, 0.5)), (58, 580, (0.0, 0.1)), (7, 20, (0.3, 0.9))):
        for _ in range(20):
            plan = random_plan(layers, budget, 1000, share, random)
            assert legal(plan, layers, budget) and list(plan) == sorted(plan, reverse=True)
            assert budget - cost(plan, layers) < layers
            assert all(0 <= layer < layers for _, skipped in plan for layer in skipped)
    assert len(random_plan(10, 40, 1000, (0.0, 0.0), random)) == 4


def test_mutation():
    random, plan = np.random.default_rng(0), ((900, (1, 3)), (500, ()), (20, (2,)))
    assert mutate(plan, 5, 1000, 0.0, (0.0, 0.5), random) == plan
    moved = mutate(plan, 5, 1000, 1.0, (0.0, 0.0), random)
    assert not {t for t, _ in moved} & {t for t, _ in plan} and len({t for t, _ in moved}) == 3
    assert sorted(len(skipped) for _, skipped in moved) == [0, 1, 2]
    for _ in range(50):
        found = mutate(plan, 5, 0, 1.0, (0.5, 0.9), random)                       # no timestep is free
        assert [t for t, _ in found] == [900, 500, 20]
        (_, first), (_, second), (_, third) = found
        assert not {1, 3} & {*first} and len(first) == 2 and 2 <= len(second) <= 4 and len(third) == 1 and third != (2,)
    shares = [sum(t not in dict(plan) for t, _ in mutate(plan, 5, 1000, 0.25, (0, 0), random)) for _ in range(2000)]
    assert np.mean(shares) / 3 == pytest.approx(0.25, abs=0.02)


def test_crossover():
    random = np.random.default_rng(0)
    a, b = ((900, (1,)), (500, ()), (20, (2,))), ((800, ()), (400, (3,)), (30, ()), (10, (4,)))
    assert cross(a, a, random) == a
    for _ in range(50):
        made = cross(a, b, random)
        assert len(made) == 4 and (10, (4,)) in made
        assert all(pair in (a[i], b[i]) for i, pair in enumerate(sorted(made, reverse=True)[:1]))
        assert set(made) <= {*a, *b}


def test_layers_open_behind_the_fifth_epoch():
    share, seen = (0.0, 0.0), []
    for epoch in range(12):
        share = skip_range(epoch, False, share, 0.05, 0.5)
        seen.append(share)
    assert [high for _, high in seen] == pytest.approx([0] * 5 + [.1, .2, .3, .4, .5, .5, .5])
    assert [low for low, _ in seen] == [0] * 6 + [0.05] * 6
    assert skip_range(1, True, (0.0, 0.0), 0.0, 0.5) == (0.0, 0.1)


WANTED = (700, 300)


def distance(plan):
    """Of the timesteps from WANTED, and of the layers left out from {1}; whole plans of two steps cost nothing more."""
    far = sum(abs(t - wanted) for (t, _), wanted in zip(plan, WANTED, strict=False)) + 500 * abs(len(plan) - 2)
    return float(far + 10 * sum(len({*skipped} ^ {1}) for _, skipped in plan))


def test_the_search_finds_what_is_wanted_and_goes_on_where_it_stopped(tmp_path):
    setting = dict(steps=2, layers=4, population=20, parents=5, mutations=10, crossovers=5, epochs=14, most=0.5, seed=1)
    judged, told = [], []

    def failing(plan):
        judged.append(plan)
        if len(judged) == 60:
            raise KeyboardInterrupt
        return distance(plan)
    with pytest.raises(KeyboardInterrupt):
        autodiffusion.search(failing, journal=tmp_path / "journal", **setting)
    assert len((tmp_path / "journal").read_text().splitlines()) == 59
    again = []
    found = autodiffusion.search(lambda plan: (again.append(plan), distance(plan))[1], journal=tmp_path / "journal",
                                 save=tmp_path / "plan.json", tell=told.append, **setting)
    assert not {*again} & {*judged[:59]} and len(told) == len(again) == len(found) - 59
    assert found == autodiffusion.search(distance, **setting)
    costs = [value for _, value in found]
    even = ((500, ()), (0, ()))
    assert costs == sorted(costs) and costs[0] < 0.2 * distance(even) and dict(found)[even] == distance(even)
    assert all(legal(plan, 4, 8) for plan, _ in found) and any(skipped for plan, _ in found for _, skipped in plan)
    assert Config(plan=tmp_path / "plan.json").plan == found[0][0] == Config(plan=json.loads(json.dumps(found[0][0]))).plan


def test_the_best_of_every_epoch_is_no_worse():
    best = []
    for epochs in range(1, 8):
        found = autodiffusion.search(distance, 2, 4, population=10, parents=3, mutations=5, crossovers=3, epochs=epochs, seed=2)
        best.append(found[0][1])
    assert all(b <= a for a, b in itertools.pairwise(best)) and best[-1] < best[0]


def test_a_plan_is_one_in_any_order():
    plans = [Config(plan=order).plan for order in itertools.permutations(((900, (3, 1)), (500, ()), (20, (2,))))]
    assert set(plans) == {((900, (1, 3)), (500, ()), (20, (2,)))}
    assert Config().plan == SIX and cost(SIX, 58) == 348


@pytest.mark.parametrize("wrong, named", [([(5, ()), (5, (1,))], "must differ"), ([(-1, ())], "at least 0")])
def test_bad_plans_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(plan=wrong)


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="leaves out layer 6; this DiTTransformer2DModel has layers 0 to 5"):
        autodiffusion.apply(FAMILIES["dit"].pipe(), Config(plan=[(5, [6])]))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        autodiffusion.apply(FAMILIES["dit"].pipe().transformer)
    with pytest.raises(ValueError, match="first-order solver"):
        autodiffusion.apply(FAMILIES["cogvideox"].pipe())
    pipe = FAMILIES["unet"].pipe()
    with autodiffusion.apply(pipe), pytest.raises(ValueError, match="eta=0.5"):
        FAMILIES["unet"].run(pipe, eta=0.5)
