import math

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import spectrum
from methods._core.cache import Passed
from methods._core.denoiser import describe

SOME = ["unet", "dit", "sd3", "flux", "latte", "cogvideox"]
SHORT = spectrum.Config(warmup=3, growth=1.0)
FAST = [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]


@pytest.mark.parametrize("check, case", contract.cases(spectrum, spectrum.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def full_steps(steps, config):
    state = spectrum.Schedule(0, config.window)
    for i in range(steps):
        state = state.after(i, state.due(i, config), config)
    return list(state.full)


@pytest.mark.parametrize("steps, growth, expected", [
    (50, 0.75, FAST), (50, 3.0, [*range(5), 6, 11, 19, 30, 44]), (50, 0.0, [*range(5), *range(6, 50, 2)]),
    (28, 0.75, [*range(5), 6, 8, 11, 15, 20, 25]), (28, 3.0, [*range(5), 6, 11, 19]),
    (20, 0.75, [*range(5), 6, 8, 11, 15]), (8, 0.75, [*range(5), 6]),
])
def test_full_steps(steps, growth, expected):
    assert full_steps(steps, spectrum.Config(growth=growth)) == expected


def test_a_history_keeps_its_last_steps_and_a_window_of_one_is_full():
    assert full_steps(50, spectrum.Config(history=3)) == FAST[-3:]
    assert full_steps(9, spectrum.Config(window=1.0, growth=0.0)) == list(range(9))
    assert full_steps(12, spectrum.Config(window=1.0, growth=0.5, warmup=2)) == [0, 1, 2, 3, 5, 7, 10]


def ahead(config, full, i, path, horizon=50):
    return sum(w * path(s) for w, s in zip(spectrum.weights(full, i, horizon, config), full, strict=True))


def test_weights_by_hand():
    found = spectrum.weights(range(5), 5, 50, spectrum.Config())
    assert found == pytest.approx([-0.26769, -0.02751, 0.20062, 0.41584, 0.61741], abs=1e-5)
    assert sum(found) == pytest.approx(0.93868, abs=1e-5)
    assert sum(spectrum.weights(range(5), 10, 50, spectrum.Config())) == pytest.approx(0.69921, abs=1e-5)
    values = {0: 1.0, 25: 2.0}.get
    assert ahead(spectrum.Config(degree=1, ridge=1.0), [0, 25], 50, values) == pytest.approx(1.0)
    assert ahead(spectrum.Config(degree=1, ridge=0.0), [0, 25], 50, values) == pytest.approx(3.0)


def test_a_constant_shrinks():
    forecast = sorted(set(range(50)) - set(FAST))
    sums = {i: sum(spectrum.weights([s for s in FAST if s < i], i, 50, spectrum.Config())) for i in forecast}
    assert sums[5] == pytest.approx(0.9387, abs=1e-4) and min(sums.values()) == sums[45] == pytest.approx(0.7304, abs=1e-4)
    assert sum(spectrum.weights(range(5), 5, 50, spectrum.Config(mix=0.5))) == pytest.approx(0.9693, abs=1e-4)


@pytest.mark.parametrize("degree", [0, 1, 3, 4])
def test_without_a_ridge_a_polynomial_is_followed_exactly(degree):
    def path(s):
        return sum((n + 1) * (s / 25 - 1) ** n for n in range(degree + 1))

    for i in (7, 9, 15):
        assert ahead(spectrum.Config(degree=degree, ridge=0.0), [0, 1, 3, 4, 6], i, path) == pytest.approx(path(i), rel=1e-6)


@pytest.mark.parametrize("more", [{}, {"ridge": 5.0}, {"degree": 1}])
def test_the_line_goes_through_the_last_two(more):
    config = spectrum.Config(mix=0.0, **more)
    assert ahead(config, [0, 3, 5], 9, lambda s: 2 - 3 * s) == pytest.approx(-25)
    assert ahead(config, [4], 9, lambda s: 7) == pytest.approx(7)


# hanjq17/Spectrum@f7b7841: its forecaster on sin 0.1 s, cos 0.2 s and 1 after the full steps of FAST, in single precision
OFFICIAL = {
    1.0: {5: (0.40043, 0.6635, 0.93868), 13: (0.88244, -0.77069, 0.92051),
          24: (0.77035, -0.62661, 0.87401), 45: (-0.49436, -0.47889, 0.73035)},
    0.5: {5: (0.44187, 0.61579, 0.96934), 13: (0.94477, -0.86603, 0.96025),
          24: (0.80454, -0.50559, 0.93701), 45: (-0.87983, -0.48646, 0.86518)},
}


@pytest.mark.parametrize("mix", OFFICIAL)
def test_forecasts_are_those_of_the_official_code(mix):
    for i, expected in OFFICIAL[mix].items():
        full = [s for s in FAST if s < i]
        found = [ahead(spectrum.Config(mix=mix), full, i, path) for path in
                 (lambda s: math.sin(0.1 * s), lambda s: math.cos(0.2 * s), lambda s: 1.0)]
        assert found == pytest.approx(expected, abs=2e-5)


def last_module(pipe):
    denoiser = describe(Family.model(pipe))
    return (denoiser.unet or denoiser.chain)[-1].module


@pytest.mark.parametrize("history", [2, 100])
@pytest.mark.parametrize("name", SOME)
def test_what_the_last_block_gives_in_every_step(name, history):
    """Against the weighted sum of what it gave in full steps; no full step reads a forecast."""
    family, config, gave = FAMILIES[name], spectrum.Config(warmup=3, growth=1.0, history=history), []
    pipe = family.pipe()
    with spectrum.apply(pipe, config):
        last_module(pipe).register_forward_hook(
            lambda m, args, out: gave.append([x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]))
        family.run(pipe, steps=10)
    full = full_steps(10, spectrum.Config(warmup=3, growth=1.0))
    calls = len(gave) // 10
    assert full == [0, 1, 2, 4, 7] and len(gave) == 10 * calls
    for call in range(calls):
        found = gave[call::calls]
        for i in sorted(set(range(10)) - set(full)):
            before = [s for s in full if s < i][-history:]
            shares = spectrum.weights(before, i, 10, config)
            for n, x in enumerate(found[i]):
                expected = sum(share * found[s][n] for share, s in zip(shares, before, strict=True))
                torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["dit", "sdxl"])
def test_forecast_steps_run_the_head_and_no_branch_of_a_block(name):
    pipe = FAMILIES[name].pipe()
    denoiser, ran = describe(Family.model(pipe)), {}
    branches = [branch.module for block in denoiser.blocks for branch in block.branches]
    inner = [layer for branch in branches for layer in branch.modules() if isinstance(layer, torch.nn.Linear)]
    outer = [pipe.transformer.proj_out_2] if name == "dit" else [pipe.unet.conv_in, pipe.unet.conv_out]
    with spectrum.apply(pipe, SHORT) as patch:
        for layer in (*inner, *outer):
            layer.register_forward_hook(lambda m, *_: ran.update({m: ran.get(m, 0) + 1}))
        FAMILIES[name].run(pipe, steps=10)
        report = patch.report()
    assert (report["computed"], report["forecast"], report["saved"]) == (5, 5, 0.5)
    assert {ran[layer] for layer in inner} == {5} and {ran[layer] for layer in outer} == {10}


def test_a_constant_model_is_not_shrunk_behind_the_last_norm():
    """Every feature is the same, every forecast a multiple of it."""
    torch.manual_seed(0)
    model = FAMILIES["pixart"].pipe().transformer
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with spectrum.apply(model, spectrum.Config(horizon=50)) as patch:
        gave = []
        describe(model).chain[-1].module.register_forward_hook(lambda m, args, out: gave.append(out))
        outs = [model(x, text, timestep=torch.tensor([500]), return_dict=False)[0] for _ in range(12)]
        assert patch.report()["forecast"] == 4
    assert not torch.allclose(gave[10], gave[8], rtol=0.03)
    for out in outs:
        torch.testing.assert_close(out, outs[0], atol=1e-3, rtol=1e-3)


def test_a_limit_too_small_for_two_features_restarts_the_history():
    pipe = FAMILIES["dit"].pipe()
    with spectrum.apply(pipe, spectrum.Config(warmup=3)) as patch:
        FAMILIES["dit"].run(pipe, steps=10)
        bytes_kept = patch.report()["cached_bytes"]
        patch.limit(bytes=bytes_kept // 4)
        out = FAMILIES["dit"].run(pipe, steps=10)
        report = patch.report()
    assert out.isfinite().all() and report["cached_bytes"] <= bytes_kept // 4 and "forecast" not in report
    assert report["reason"].startswith("what it keeps does not fit")


def test_a_skipped_last_block_keeps_nothing():
    """Skip-layer guidance of SD3 makes one more call, which passes over blocks: if over the last, it is never forecast."""
    pipe, family = FAMILIES["sd3"].pipe(), FAMILIES["sd3"]
    last = len(pipe.transformer.transformer_blocks) - 1
    skip = dict(skip_guidance_layers=[last], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    with spectrum.apply(pipe, SHORT) as patch:
        out = family.run(pipe, steps=10, **skip)
        assert out.isfinite().all() and patch.report()["forecast"] == 5 and patch.report()["computed"] == 5 + 9


def test_a_run_of_full_steps_is_no_gain():
    pipe = FAMILIES["dit"].pipe()
    with spectrum.apply(pipe) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe, steps=5), contract.plain("dit", steps=5))
        assert patch.report()["state"] == "no gain" and patch.report()["reason"] == "the first 5 steps are full"


def test_cost_falls_and_distance_grows_along_the_growth():
    plain, computed, distances = contract.plain("dit", steps=24), [], []
    for growth in (0.0, 0.75, 3.0):
        pipe = FAMILIES["dit"].pipe()
        with spectrum.apply(pipe, spectrum.Config(growth=growth)) as patch:
            distances.append(float((FAMILIES["dit"].run(pipe, steps=24) - plain).square().mean()))
            computed.append(patch.report()["computed"])
    assert computed == [14, 10, 8] and distances == sorted(distances) and distances[0] > 0


def test_a_bare_model_needs_a_horizon():
    model = FAMILIES["dit"].pipe().transformer
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        spectrum.apply(model)
    assert not any(isinstance(value, Passed) for value in vars(model).values())


@pytest.mark.parametrize("name", ["dit", "flux", "latte"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(spectrum, SHORT, FAMILIES[name]), steps=10)
    assert all(report["forecast"] > 0 for report in reports)


@pytest.mark.parametrize("wrong", [{"window": 0.5}, {"growth": -1}, {"warmup": 0}, {"degree": -1}, {"ridge": -0.1},
                                   {"mix": 1.5}, {"horizon": 0}, {"history": 0}])
def test_bad_values_are_named(wrong):
    with pytest.raises(ValueError, match=next(f"{name}={value}" for name, value in wrong.items())):
        spectrum.Config(**wrong)
