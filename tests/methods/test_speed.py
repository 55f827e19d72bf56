import math

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from methods import fora, speed, tome
from methods.speed import Config, activation, align, cosines, expand, fit, reduce, stages

FLUX = Config()


@pytest.mark.parametrize("check, case", contract.cases(speed, speed.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(steps, mu=1.15):
    """Of FLUX at full size: even ones, shifted."""
    even = [1 - i / steps for i in range(steps)]
    return [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in even]


# ---- the equations --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t, r, kappa, aligned", [
    (.5, 2, 4 / 3, 2 / 3), (.8, 1.5, 1.071429, .857143), (1, 2, 1, 1), (0, 3, 3, 0)])
def test_alignment(t, r, kappa, aligned):
    assert align(t, r) == (pytest.approx(kappa, rel=1e-6), pytest.approx(aligned, rel=1e-6))
    k, to = align(t, r)
    assert k * (1 - t) / r == pytest.approx(1 - to) and k * t == pytest.approx(to)       # of the image and of the noise


def test_a_component_is_active_where_its_velocity_differs_by_delta():
    assert activation(0.3, 0.1529412) == pytest.approx(0.6, abs=1e-6)
    for power, delta in ((0.3, 0.01), (2.0, 0.4), (0.01, 0.005)):
        t = activation(power, delta)
        r = (1 - t) / t
        assert r ** 2 * power * (1 + power) / (1 + r ** 2 * power) == pytest.approx(delta)


@pytest.mark.parametrize("delta, time", [(.01, .852663), (.05, .718038), (.1, .638107), (.2, .543840)])
def test_activation_times_of_flux(delta, time):
    power = FLUX.amplitude * 32 ** -FLUX.exponent
    assert power == pytest.approx(0.266535, abs=1e-6) and activation(power, delta) == pytest.approx(time, abs=1e-5)


@pytest.mark.parametrize("steps, delta, start", [(50, .01, 18), (50, .05, 28), (28, .01, 10), (8, .01, 3), (4, .01, 2)])
def test_stages_of_flux(steps, delta, start):
    """The documented ones, of 50 steps; for square images of 1024."""
    assert stages(levels(steps), Config(delta=delta), (128, 128)) == [(0, .5), (start, 1.0)]


def test_stages_of_wan_and_of_three_scales():
    wan = {"amplitude": 219.484718, "exponent": 2.422687}
    shifted = [5 * s / (1 + 4 * s) for s in (1 - i / 50 for i in range(50))]
    assert stages(shifted, Config(**wan), (90, 160)) == [(0, .5), (30, 1.0)]
    assert stages(shifted, Config(scales=(2 / 3, 1.0), **wan), (90, 160)) == [(0, 2 / 3), (34, 1.0)]
    for scale, time in ((.25, .934057), (.5, .852663)):
        power = FLUX.amplitude * (64 * scale) ** -FLUX.exponent
        assert activation(power, .01) == pytest.approx(time, abs=1e-6)
    three = stages(levels(50), Config(scales=(.25, .5, 1)), (128, 128))
    assert [scale for _, scale in three] == [.25, .5, 1] and three[2][0] == 18 and 0 < three[1][0] < 18


def test_the_last_step_is_whole_and_no_stage_is_empty():
    assert stages(levels(4), Config(delta=0.9), (128, 128)) == [(0, .5), (3, 1.0)]
    assert stages([1.0], FLUX, (128, 128)) == [(0, 1.0)]
    assert stages([0.3, 0.1], FLUX, (128, 128)) == [(0, 1.0)]
    assert stages([1.0, 0.2], Config(scales=(.25, .5, 1)), (128, 128)) == [(0, .25), (1, 1.0)]


def test_cosines_are_orthonormal_and_the_sum_by_hand():
    for n in (1, 4, 7):
        basis = cosines(n, normal(1))
        torch.testing.assert_close(basis @ basis.mT, torch.eye(n, dtype=torch.float64))
    x = [3.0, -1.0, 2.0]
    for k, got in enumerate((cosines(3, normal(1)) @ torch.tensor(x, dtype=torch.float64)).tolist()):
        weight = math.sqrt((1 if k == 0 else 2) / 3)
        assert got == pytest.approx(weight * sum(v * math.cos(math.pi * k * (2 * i + 1) / 6) for i, v in enumerate(x)))


@pytest.mark.parametrize("small, size", [((4, 4), (8, 8)), ((5, 5), (8, 8)), ((3, 6), (7, 9))])
def test_expansion(small, size):
    x, noise = normal(2, *small), normal(2, *size, seed=1)
    grown = expand(x, noise)
    torch.testing.assert_close(reduce(grown, small), x)                             # what was there is still there
    coefficients = cosines(size[0], noise) @ (grown - noise) @ cosines(size[1], noise).mT
    coefficients[:, :small[0], :small[1]] = 0
    assert coefficients.abs().max() < 1e-12                                         # and all else is of the noise
    torch.testing.assert_close(expand(reduce(noise, small), noise), noise)
    r = math.sqrt(math.prod(size) / math.prod(small))
    constant = align(0.0, r)[0] * expand(torch.full_like(x, 3.0), torch.zeros_like(noise))
    torch.testing.assert_close(constant, torch.full_like(noise, 3.0))


def test_one_value_of_three_keeps_its_mean():
    grown = align(0.5, 2)[0] * expand(torch.full((1, 1), 3.0), 0.5 * normal(2, 2))
    assert float(grown.mean()) == pytest.approx(2.0)                                # 1 - t~ of an image, times 6


def test_noise_stays_noise():
    x, noise, t = 0.7 * normal(400, 6, 6), 0.7 * normal(400, 12, 12, seed=1), 0.7
    kappa, aligned = align(t, 2)
    grown = kappa * expand(x, noise)
    assert aligned == pytest.approx(0.8235, abs=1e-4) and float(grown.std()) == pytest.approx(aligned, rel=1e-2)
    assert float(reduce(normal(400, 12, 12), (6, 6)).std()) == pytest.approx(1.0, rel=2e-2)


def test_a_power_law_is_found_again():
    rows, columns = torch.arange(16) / 2, torch.arange(24) / 2
    spectrum = 7.0 * (rows[:, None] ** 2 + columns ** 2).double().sqrt().clamp_min(0.1) ** -1.7
    sign = normal(5, 16, 24).sign()
    latents = cosines(16, sign).mT @ (sign * spectrum.sqrt()) @ cosines(24, sign)
    assert fit(latents) == (pytest.approx(7.0, rel=1e-6), pytest.approx(1.7, rel=1e-6))


# ---- the run --------------------------------------------------------------------------------------------------------------

def by_hand(pipe, config, noise, steps, prompts, pooled, scale):
    """A loop of its own over SD3: slow transforms, levels of the scheduler in Python's numbers."""
    pipe.scheduler.set_timesteps(steps)
    sigmas = pipe.scheduler.sigmas.tolist()
    size = tuple(noise.shape[-2:])
    path = dict((start, tuple(int(s * n) // 2 * 2 for n in size)) for start, s in stages(sigmas[:-1], config, size))
    x, now = reduce(noise, path[0]), path[0]
    for i in range(steps):
        level = sigmas[i]
        if i in path and i:
            kappa, level = align(sigmas[i], math.sqrt(math.prod(path[i]) / math.prod(now)))
            x, now = kappa * expand(x, sigmas[i] * reduce(noise, path[i])), path[i]
        out = pipe.transformer(torch.cat([x, x]), prompts, pooled, torch.tensor([level * 1000] * 2).to(x)).sample
        null, cond = out.chunk(2)
        x = x + (sigmas[i + 1] - level) * (null + scale * (cond - null))
    return x


@pytest.mark.parametrize("steps, scales, delta, size", [(6, (.5, 1.0), .3, (32, 32)), (9, (.5, 1.0), .6, (32, 48)),
                                                       (12, (.25, .5, 1.0), .3, (32, 32)), (10, (.75, 1.0), .4, (32, 32))])
def test_whole_runs_equal_a_loop_of_its_own(steps, scales, delta, size):
    family = FAMILIES["sd3"]
    pipe, config = family.pipe(), Config(scales=scales, delta=delta, amplitude=5.0)
    pipe.transformer.double()
    call = {name: x.double() for name, x in family.call(1, 0).items()}
    noise = normal(1, 4, size[0] // 2, size[1] // 2)
    with speed.apply(pipe, config) as patch:
        ours = family.run(pipe, steps=steps, size=size, latents=noise)
        report = patch.report()
    assert report["small"] > 0 and report["full"] > 0
    prompts, pooled = (torch.cat([call[f"negative_{name}"], call[name]]) for name in ("prompt_embeds", "pooled_prompt_embeds"))
    theirs = by_hand(pipe, config, noise, steps, prompts, pooled, 3.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def seen(name, config, **setting):
    """(sizes of the latent, times) of the calls of the model, below the patch."""
    family, calls = FAMILIES[name], []
    pipe = family.pipe()
    row = speed.Patch(pipe, "look").denoiser.row
    with speed.apply(pipe, config) as patch:
        watch = speed.Patch(pipe, "watch")
        watch.each_call(lambda context: calls.append((tuple(context.sample.shape), float(torch.as_tensor(
            context.inputs[row.time]).max()), context.branch, context.fresh, context.size)))
        with watch.on():
            family.run(pipe, **setting)
        return calls, patch.report()


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-kontext", "wan"])
def test_what_the_model_is_given(name):
    calls, report = seen(name, speed.TINY, steps=6)
    step = 2 if name == "wan" else 1                              # guided by two calls
    sizes = [size for *_, size in calls[::step]]
    small, full = sizes[0], sizes[-1]
    assert report["small"] == sizes.count(small) and report["full"] == sizes.count(full) and len(set(sizes)) == 2
    assert full[1:] == (2 * small[1], 2 * small[2]) and small[0] == full[0]
    fresh = [each for *_, each, _ in calls[::step]]
    assert [i for i, each in enumerate(fresh) if each] == [0, report["small"]]      # what others keep is dropped once
    times, turn = [time for _, time, *_ in calls[::step]], report["small"]
    assert times[turn] > times[turn + 1] and all(a > b for a, b in zip(times[:turn], times[1:turn], strict=False))
    unit = times[0]
    sigma = [time / unit for time in times]
    plain, _ = seen(name, Config(delta=1e-9, amplitude=1e6), steps=6)
    before = plain[turn * step][1] / unit
    assert sigma[turn] == pytest.approx(align(before, 2)[1], rel=1e-5) and before < sigma[turn]
    assert report["saved"] == pytest.approx(0.75 * turn / 6, abs=1e-4)


def test_a_run_from_an_image_has_the_level_that_it_should_have():
    """Of a constant image and noise of one: the constant keeps its share, the noise its size."""
    family = FAMILIES["sd3"]
    pipe = family.second_pipe(family.pipe())
    with speed.apply(pipe, speed.TINY) as patch:
        solver = patch.solver
        family.run(pipe, image=torch.rand(1, 3, 32, 32), strength=0.7, steps=8)
        assert solver.first == 2 and patch.report()["small"] > 0
        solver.noise, solver.size, t = None, (64, 64), solver.sigmas[solver.first]
        solver.stages, solver.prompts = [(solver.first, (32, 32))], 40
        low = solver.small((1 - t) * 3.0 + t * normal(40, 4, 64, 64))
    assert low.shape == (40, 4, 32, 32)
    assert float(low.mean()) == pytest.approx((1 - t) * 3.0, rel=0.01) and float(low.std()) == pytest.approx(t, rel=0.01)


def test_cost_falls_and_distance_grows_along_delta():
    family, plain = FAMILIES["sd3"], contract.plain("sd3", steps=10)
    saved, distances = [], []
    for delta in (1e-7, 0.05, 0.3, 0.8):                           # at level 1 all is noise: the first step is small
        pipe = family.pipe()
        with speed.apply(pipe, Config(amplitude=5.0, delta=delta)) as patch:
            distances.append(float((family.run(pipe, steps=10) - plain).square().mean()))
            saved.append(patch.report()["saved"])
    assert saved == sorted(saved) and saved[0] == 0.075 and len(set(saved)) == 4
    assert distances == sorted(distances) and distances[0] > 0


def test_a_run_that_starts_too_late_says_so():
    family = FAMILIES["sd3"]
    pipe = family.second_pipe(family.pipe())
    setting = dict(image=torch.rand(1, 3, 32, 32), strength=0.4, steps=10)
    plain = family.run(pipe, **setting)
    with speed.apply(pipe, Config(amplitude=5.0, delta=0.05)) as patch:
        assert torch.equal(family.run(pipe, **setting), plain)
        assert patch.report()["reason"] == "with delta=0.05 what a smaller grid leaves out matters from the first step on"


@pytest.mark.parametrize("other, config", [(fora, fora.Config(interval=2)), (tome, tome.Config(ratio=0.5))])
def test_it_stacks(other, config):
    family = FAMILIES["sd3"]
    pipe = family.pipe()
    with speed.apply(pipe, speed.TINY) as one, other.apply(pipe, config) as two:
        out = family.run(pipe, steps=8)
        assert one.report()["state"] == two.report()["state"] == "engaged" and out.isfinite().all()


def test_maps_of_full_size_are_refused():
    refused = contract.refusals(lambda family: speed.apply(family.pipe(), speed.TINY).remove())
    assert [name for name, words in refused.items() if words is None] == ["sd3", "flux"]
    assert "DDIMScheduler has others" in refused["dit"]
    for name, words in {"wan-i2v": "takes conditions of full size", "wan-vace": "takes conditions of full size",
                        "kandinsky5": "lays out its latent is not known", "hunyuan-image": "sums up over steps"}.items():
        with pytest.raises(ValueError, match=words):
            speed.apply(FAMILIES[name].pipe(), speed.TINY)
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        speed.apply(FAMILIES["sd3"].pipe().transformer)
    pipe = FAMILIES["mochi"].pipe()                               # the released one counts from 0 to 1
    pipe.scheduler = type(pipe.scheduler)(invert_sigmas=True)
    with pytest.raises(ValueError, match="needs the falling levels of flow matching"):
        speed.apply(pipe, speed.TINY)
    pipe = FAMILIES["sd3"].pipe()
    with speed.apply(pipe, speed.TINY), pytest.raises(ValueError, match="a ControlNet adds residuals"):
        x = torch.randn(1, 4, 16, 16)
        call = FAMILIES["sd3"].call(1, 0)
        pipe.scheduler.set_timesteps(4)
        pipe.transformer(x, call["prompt_embeds"], call["pooled_prompt_embeds"], pipe.scheduler.timesteps[:1],
                         block_controlnet_hidden_states=[torch.zeros(1, 64, 32)])


@pytest.mark.parametrize("bad, said", [
    ({"scales": ()}, "must rise"), ({"scales": (.5, .4, 1)}, "must rise"), ({"scales": (.5,)}, "to 1"),
    ({"scales": (0, 1)}, "from above 0"), ({"delta": 1.0}, r"delta=1.0 outside \(0, 1\)"),
    ({"amplitude": 0}, "must be positive"),
    ({"exponent": -1}, "must be positive")])
def test_bad_values_are_named(bad, said):
    with pytest.raises(ValueError, match=said):
        Config(**bad)
