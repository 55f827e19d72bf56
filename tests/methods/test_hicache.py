import math

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import hicache, taylorseer
from methods._core.denoiser import describe

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]
QUICK = hicache.Config(interval=3, first_enhance=2)
HALF = 1 / math.sqrt(2)


@pytest.mark.parametrize("check, case", contract.cases(hicache, QUICK), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("x", [-1.5, 0.0, 0.35, 2.0])
def test_the_recurrence_is_the_closed_form(x):
    closed = [1, 2 * x, 4 * x ** 2 - 2, 8 * x ** 3 - 12 * x, 16 * x ** 4 - 48 * x ** 2 + 12]
    assert hicache.hermite(x, 4) == pytest.approx(closed)
    assert [len(hicache.hermite(x, order)) for order in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("sigma, expected", [
    (0.5, [-0.125, 0.25, 0.875, 1.75, 2.875]), (0.71, [0.0041, 1.5288, 4.07, 7.6276, 12.2017])])
def test_what_the_second_difference_is_multiplied_by(sigma, expected):
    found = [hicache.terms(k, hicache.Config(sigma=sigma))[2] for k in range(1, 6)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert found == pytest.approx([(4 * sigma ** 4 * k * k - 2 * sigma ** 2) / 2 for k in range(1, 6)])


@pytest.mark.parametrize("sigma, slope", [(0.5, 0.5), (HALF, 1.0), (0.7, 0.98), (1.0, 2.0)])
def test_the_first_order_goes_two_sigma_squared_of_the_way(sigma, slope):
    for basis in ("hermite", "power"):
        found = [hicache.terms(k, hicache.Config(max_order=1, sigma=sigma, basis=basis)) for k in range(1, 5)]
        part = slope if basis == "hermite" else sigma ** 2
        assert [each[0] for each in found] == [1.0] * 4
        assert [each[1] for each in found] == pytest.approx([part * k for k in range(1, 5)])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_orders_are_even_or_odd(order):
    """So that a negative gap and a negative distance together change nothing: D(n), too, changes its sign with odd n alone."""
    config = hicache.Config(max_order=order, sigma=0.6)
    ahead, back = hicache.terms(3, config), hicache.terms(-3, config)
    assert back == pytest.approx([(-1) ** n * term for n, term in enumerate(ahead)])


def test_the_power_basis_is_a_scaled_taylor_polynomial():
    found = hicache.terms(3, hicache.Config(max_order=3, sigma=0.6, basis="power"))
    assert found == pytest.approx([0.6 ** (2 * n) * 3 ** n / math.factorial(n) for n in range(4)])
    assert hicache.terms(3, hicache.Config(max_order=3, sigma=1.0, basis="power")) == pytest.approx([1, 3, 4.5, 4.5])


@pytest.mark.parametrize("sigma", [0.5, 0.7])
def test_a_straight_path_is_followed_better_than_by_reuse(sigma):
    """With sigma = 0.5 the error is half of that of reuse."""
    for k in range(1, 6):
        error = abs(hicache.terms(k, hicache.Config(max_order=1, sigma=sigma))[1] - k) / k
        assert error == pytest.approx(1 - 2 * sigma ** 2)


@pytest.mark.parametrize("name", CHAINS)
def test_the_first_order_of_taylorseer_is_a_case_of_it(name):
    family, outs = FAMILIES[name], []
    for method, config in ((taylorseer, taylorseer.Config(interval=3, max_order=1, first_enhance=2)),
                           (hicache, hicache.Config(interval=3, max_order=1, first_enhance=2, sigma=HALF))):
        pipe = family.pipe()
        with method.apply(pipe, config):
            outs.append(family.run(pipe, steps=8))
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_order_zero_reuses(name):
    family, outs = FAMILIES[name], []
    for method in (taylorseer, hicache):
        pipe = family.pipe()
        with method.apply(pipe, method.Config(interval=3, max_order=0, first_enhance=1)):
            outs.append(family.run(pipe, steps=8))
    assert torch.equal(*outs)


@pytest.mark.parametrize("basis", ["hermite", "power"])
@pytest.mark.parametrize("name", CHAINS)
def test_modules_follow_their_path(name, basis):
    """What an attention gives in every step, against its factors taken by hand from its full steps."""
    family, config = FAMILIES[name], hicache.Config(interval=4, first_enhance=3, sigma=0.6, basis=basis)
    pipe, gave = family.pipe(), []
    branch = describe(Family.model(pipe)).blocks[1].branches[0]
    with hicache.apply(pipe, config) as patch:
        branch.module.register_forward_hook(lambda m, args, out: gave.append(out[0] if isinstance(out, tuple) else out))
        family.run(pipe, steps=10)
        assert patch.report()["saved"] == 0.6                      # full: 0, 1, 2, 6
    calls = len(gave) // 10
    for call in range(calls):
        f = gave[call::calls]
        first = f[2] - f[1]                                        # step 1 had no difference yet: the second one is not known
        later = (f[6] - f[2]) / 4
        second = (later - first) / 4
        for k in (1, 2, 3):
            x = 0.6 * k
            one, two = (0.6 * 2 * x, 0.36 * (4 * x * x - 2) / 2) if basis == "hermite" else (0.6 * x, 0.36 * x * x / 2)
            torch.testing.assert_close(f[2 + k], f[2] + one * first, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(f[6 + k], f[6] + one * later + two * second, atol=1e-5, rtol=1e-4)


def test_the_basis_changes_a_run_and_sigma_moves_it_from_reuse():
    """The smaller sigma, the nearer to a run that reuses."""
    distances, family = [], FAMILIES["dit"]

    def run(**config):
        pipe = family.pipe()
        with hicache.apply(pipe, hicache.Config(interval=3, first_enhance=2, **config)):
            return family.run(pipe, steps=9)

    reused = run(max_order=0)
    for sigma in (0.05, 0.2, 0.5, 0.7):
        distances.append(float((run(max_order=1, sigma=sigma) - reused).square().mean()))
    assert distances == sorted(distances) and distances[0] > 0
    assert not torch.equal(run(), run(basis="power"))


def test_a_run_of_full_steps_is_no_gain():
    pipe = FAMILIES["dit"].pipe()
    with hicache.apply(pipe) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe, steps=3), contract.plain("dit", steps=3))
        assert patch.report()["state"] == "no gain" and patch.report()["reason"] == "the first 3 steps are full"


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_blocks_compile_whole(name):
    reports = contract.compiled_blocks_agree(contract.Case(hicache, QUICK, FAMILIES[name]), steps=9)
    assert all(report["forecast"] > 0 for report in reports)


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"max_order": -1}, {"first_enhance": 0}, {"sigma": 0.0}, {"sigma": 1.1},
                                   {"basis": "sine"}])
def test_bad_values_are_named(wrong):
    with pytest.raises(ValueError, match=next(f"{name}={value!r}" for name, value in wrong.items())):
        hicache.Config(**wrong)
