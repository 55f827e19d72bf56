import pytest
import torch
from contracts import patch as contract
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from families import FAMILIES

from methods import pfdiff
from methods._core.solver import DDIMGrid, EulerGrid, FlowGrid


@pytest.mark.parametrize("check, case", contract.cases(pfdiff, pfdiff.Config(k=1)), ids=contract.name)
def test_contract(check, case):
    check(case)


PATHS = {(1, 1, 7): [(0, 0, 1), (1, 2, 3), (3, 4, 5), (5, 6, 7)], (2, 1, 10): [(0, 0, 1), (1, 2, 4), (4, 5, 7), (7, 8, 10)],
         (2, 2, 10): [(0, 0, 1), (1, 3, 4), (4, 6, 7), (7, 9, 10)], (3, 2, 13): [(0, 0, 1), (1, 3, 5), (5, 7, 9), (9, 11, 13)],
         (3, 2, 3): [(0, 0, 1), (1, 2, 3)], (3, 3, 4): [(0, 0, 1), (1, 2, 4)], (2, 1, 2): [(0, 0, 1), (1, 1, 2)],
         (1, 1, 1): [(0, 0, 1)], (0, 1, 3): [(0, 0, 1), (1, 1, 2), (2, 2, 3)]}


@pytest.mark.parametrize("k, h, grid", PATHS)
def test_evaluations_and_jumps(k, h, grid):
    assert pfdiff.jumps(grid, k, h) == PATHS[k, h, grid]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("grid", range(1, 30))
def test_number_of_evaluations(k, grid):
    path = pfdiff.jumps(grid, k, 1)
    assert len(path) == 1 + -(-(grid - 1) // (k + 1))
    assert [jump.to for jump in path][:-1] == [jump.start for jump in path][1:] and path[-1].to == grid


def drive(scheduler, field, k, h, steps, x, **set_timesteps):
    """Run the solver as a pipeline would, with `field(x, grid point)` for the network."""
    class Pipe:
        pass
    pipe, patch = Pipe(), Pipe()
    pipe.scheduler, patch.pipe, patch.counts, patch.model = scheduler, pipe, {"evaluations": 0}, torch.nn.Identity()
    solver = pfdiff._Solver(patch, pfdiff.Config(k=k, h=h))
    solver.set_timesteps(scheduler.set_timesteps, steps, **set_timesteps)
    seen = []
    for jump in solver.path:
        solver.jump = jump
        at = x if solver.past is None or jump.at == jump.start else solver.springboard(x, solver.past)
        seen.append(jump.at)
        x = solver.step(lambda *a, **k: (None,), field(at, jump.at), None, x)[0]
    return x, seen


@pytest.mark.parametrize("k, h", [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("steps", [7, 10, 12])
def test_a_constant_score_is_one_ddim_step(k, h, steps):
    scheduler = DDIMScheduler(clip_sample=False)
    x, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    out, _ = drive(scheduler, lambda x, at: eps, k, h, steps, x)
    scheduler.set_timesteps(steps)
    grid = DDIMGrid(scheduler)
    torch.testing.assert_close(out, grid.move(x, eps, 0, steps), atol=1e-9, rtol=1e-6)


# onefly123/PFDiff@e63fd30fa69e, the DDIM samplers of uncondition/ddim-main, grids of 7, 10, 12 and 13 intervals
OFFICIAL = {
    (1, 1): [[-0.5173024, -66.0838], [-20.56539, -75.81765], [-19.60239, -124.2922], [-19.93831, -131.3848]],
    (2, 1): [[0.5270815, -63.5992], [-18.23339, -74.74049], [-25.45354, -133.0678], [-31.129, -135.9305]],
    (2, 2): [[-12.29787, -74.32356], [6.875022, -119.2553], [-14.25127, -123.4915], [-19.03251, -127.7415]],
    (3, 1): [[1.526156, -63.75347], [-20.3488, -76.57046], [-31.05557, -132.4879], [-27.03699, -132.308]],
    (3, 2): [[-13.38259, -74.02867], [7.29491, -123.8558], [-11.47583, -123.2491], [-16.55308, -123.6779]],
    (3, 3): [[6.273085, -71.29748], [12.75316, -87.29781], [22.67377, -119.6581], [13.31859, -113.6929]]}


@pytest.mark.parametrize("k, h", OFFICIAL)
def test_equals_the_official_code(k, h):
    x, ours = torch.tensor([[0.3, -1.1]], dtype=torch.float64), []
    for steps in (7, 10, 12, 13):
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps.double()
        out, _ = drive(scheduler, lambda x, at, t=t: torch.sin(x + t[at] / 400), k, h, steps, x)
        ours.append(out[0])
    torch.testing.assert_close(torch.stack(ours), torch.tensor(OFFICIAL[k, h], dtype=torch.float64), atol=1e-5, rtol=1e-6)


def test_midpoint_rule_on_a_flow_that_is_linear_in_time():
    scheduler = FlowMatchEulerDiscreteScheduler()
    sigmas = [1 - i / 7 for i in range(7)]
    out, seen = drive(scheduler, lambda x, at: torch.full_like(x, 1 - at / 7), 1, 1, None, torch.zeros(1, 1), sigmas=sigmas)
    assert seen == [0, 2, 4, 6]
    assert float(out) == pytest.approx(-0.5 - (1 / 7) ** 2 / 2, abs=1e-6)


def test_a_constant_velocity_is_exact():
    out, _ = drive(FlowMatchEulerDiscreteScheduler(), lambda x, at: torch.full_like(x, 0.7), 2, 1, 11, torch.ones(1, 1))
    assert float(out) == pytest.approx(0.3, abs=1e-6)


def test_the_jump_starts_from_the_latent_not_from_the_springboard():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    grid = FlowGrid(scheduler)
    velocity = [torch.tensor([[0.3]]), torch.tensor([[-1.1]])]
    out, _ = drive(FlowMatchEulerDiscreteScheduler(), lambda x, at: velocity[at > 0], 1, 1, 7, torch.ones(1, 1))
    expected = grid.move(grid.move(torch.ones(1, 1), velocity[0], 0, 1), velocity[1], 1, 7)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_steps_of_one_interval_are_those_of_the_library(prediction):
    """Where T divides 1000 our grid is the library's, so an ordinary step must be its step."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=True, clip_sample_range=1.5)
    scheduler.set_timesteps(10)
    grid, x, output = DDIMGrid(scheduler), *torch.randn(2, 1, 3, 4, 4)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(output, t, x, return_dict=False)[0]
        torch.testing.assert_close(grid.step(x, output, i, i + 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_steps_are_those_of_the_library(prediction):
    """The latent and what the model is given differ by the scale of the noise."""
    scheduler = EulerDiscreteScheduler(prediction_type=prediction, use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    grid, x, output = EulerGrid(scheduler), *torch.randn(2, 1, 3, 4, 4)
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(grid.input(x, i), given)
        torch.testing.assert_close(grid.latent(given, i), x)
        expected = scheduler.step(output, t, x, return_dict=False)[0]
        torch.testing.assert_close(grid.step(x, output, i, i + 1), expected, atol=1e-4, rtol=1e-4)


def test_the_model_is_given_the_moved_latent_scaled_under_euler():
    family, seen = FAMILIES["sdxl"], []
    pipe = family.pipe()
    with pfdiff.apply(pipe, pfdiff.Config(k=1, h=1)) as patch:
        pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        step, scores = patch.solver.step, []

        def watch(call, output, t, sample, *args, **kwargs):
            scores.append((sample.clone(), patch.solver.past))
            return step(call, output, t, sample, *args, **kwargs)

        patch.solver.step = watch
        family.run(pipe, steps=3)
        grid = patch.solver.grid
    latent, past = scores[1]
    moved = latent + (grid.sigmas[2] - grid.sigmas[1]) * past
    torch.testing.assert_close(seen[1], (moved / (grid.sigmas[2] ** 2 + 1).sqrt()).repeat(2, 1, 1, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "sdxl"])
@pytest.mark.parametrize("strength", [1.0, 0.65, 0.3, 0.15])
def test_image_to_image_jumps_over_the_steps_that_are_left(name, strength):
    """Those that the pipeline leaves out are not thinned."""
    family, seen = FAMILIES[name], []
    pipe = family.second_pipe(family.pipe())
    family.model(pipe).register_forward_pre_hook(lambda *_: seen.append(1))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    family.run(pipe, steps=10, image=image, strength=strength)
    steps = len(seen)
    with pfdiff.apply(pipe, pfdiff.Config(k=1, h=1)) as patch:
        out = family.run(pipe, steps=10, image=image, strength=strength)
        path = patch.solver.path
    assert out.isfinite().all() and len(seen) - steps == len(path) == len(pfdiff.jumps(steps, 1, 1))
    assert path[0].start == 10 - steps and path[-1].to == 10


@pytest.mark.parametrize("name", ["flux-kontext", "wan-i2v", "hunyuan-video-15", "svd"])
def test_conditions_behind_the_latent_stay_as_they_are(name):
    family, seen = FAMILIES[name], []
    pipe, plain = family.pipe(), []

    def watch(into):
        def see(model, args, kwargs):
            x = kwargs.get("hidden_states", kwargs.get("sample", args[0] if args else None))
            into.append(x.clone())
        return family.model(pipe).register_forward_pre_hook(see, with_kwargs=True)

    handle = watch(plain)
    family.run(pipe, steps=5)
    handle.remove()
    with pfdiff.apply(pipe, pfdiff.Config(k=1, h=1)) as patch:
        handle = watch(seen)
        family.run(pipe, steps=5)
        own = patch.solver.past.shape[1:]
    handle.remove()
    rest = torch.ones_like(plain[0], dtype=torch.bool)
    rest[(slice(None), *(slice(n) for n in own))] = False
    assert rest.any() and len(seen) < len(plain)
    calls = len(plain) // 5
    for i, x in enumerate(seen):
        assert torch.equal(x[rest], plain[i % calls][rest])


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_the_network_runs_and_the_bar_counts_evaluations_only(family):
    pipe, seen = FAMILIES[family].pipe(), []
    pipe.transformer.register_forward_hook(lambda *_: seen.append(1))
    with pfdiff.apply(pipe, pfdiff.Config(k=3, h=2)) as patch:
        FAMILIES[family].run(pipe, steps=13)
        assert len(seen) == patch.report()["evaluations"] == 4


def test_other_solvers_bare_models_and_noise_are_refused():
    pipe = FAMILIES["unet"].pipe()
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        pfdiff.apply(pipe.unet)
    with pfdiff.apply(pipe), pytest.raises(ValueError, match="eta=0.5 must be 0"):
        FAMILIES["unet"].run(pipe, eta=0.5)
    for scheduler, reason in ((PNDMScheduler(), "PNDMScheduler steps from several past outputs"),
                              (UniPCMultistepScheduler(), "UniPCMultistepScheduler steps from several past outputs"),
                              (EulerAncestralDiscreteScheduler(), "EulerAncestralDiscreteScheduler draws noise"),
                              (HeunDiscreteScheduler(), "HeunDiscreteScheduler is not a first-order solver")):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=reason):
            pfdiff.apply(pipe)


@pytest.mark.parametrize("wrong, named", [({"k": 4}, "k=4"), ({"k": 1, "h": 2}, "h=2"), ({"k": 2, "h": 0}, "h=0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        pfdiff.Config(**wrong)
