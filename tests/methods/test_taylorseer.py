import math

import authors_dit
import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import fora, taylorseer
from methods._core.denoiser import describe

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]
QUICK = taylorseer.Config(interval=3, max_order=2, first_enhance=2)


@pytest.mark.parametrize("check, case", contract.cases(taylorseer, QUICK), ids=contract.name)
def test_contract(check, case):
    check(case)


def full_steps(steps, **config):
    full = []
    for i in range(steps):
        if taylorseer.is_full(i, full[-1] if full else None, taylorseer.Config(**config)):
            full.append(i)
    return full


def test_full_steps():
    assert full_steps(50) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    assert [49 - i for i in full_steps(50, interval=4, first_enhance=2)] == [49, 48, *range(44, -1, -4)]
    assert [len(full_steps(50, interval=n)) for n in (4, 5, 6, 7)] == [14, 12, 10, 9]
    assert [len(full_steps(50, interval=n, first_enhance=2)) for n in (3, 4, 5, 6)] == [18, 14, 11, 10]
    assert full_steps(50, interval=5, first_enhance=1) == list(range(0, 50, 5))


def follow(path, full, order):
    """Factors after the full steps of a path over the steps, all differences allowed."""
    found, last = None, None
    for known, i in enumerate(full):
        gaps = [torch.tensor(float(i - last) if last is not None and n < known else math.inf) for n in range(order)]
        found, last = taylorseer.factors(torch.tensor([float(path(i))]), found, gaps), i
    return found


def ahead(found, k):
    return float(taylorseer.forecast(found, [torch.tensor(k ** n / math.factorial(n)) for n in range(len(found))]))


def test_differences_and_forecasts_by_hand():
    found = follow(lambda s: s * s, [0, 3, 6], 2)
    assert [float(d) for d in found] == [36, 9, 2] and ahead(found, 1) == 46 and ahead(found, 2) == 58
    found = follow(lambda s: s * s, [0, 1, 2, 8], 2)
    assert [float(d) for d in found] == pytest.approx([64, 10, 7 / 6]) and ahead(found, 1) == pytest.approx(74.58333)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_straight_path_is_followed_exactly(order):
    found = follow(lambda s: 3 - 2 * s, [0, 1, 5, 9], order)
    assert [ahead(found, k) for k in range(4)] == [-15, -17, -19, -21]
    assert ahead(follow(lambda s: 7, [0, 1, 2], order), 5) == 7 == ahead(follow(lambda s: 7, [0], order), 5)


@pytest.mark.parametrize("name", CHAINS)
def test_modules_follow_their_path(name):
    """What an attention gives in every step, against its factors taken by hand from its full steps."""
    family, config = FAMILIES[name], taylorseer.Config(interval=4, max_order=2, first_enhance=3)
    pipe, gave = family.pipe(), []
    branch = describe(Family.model(pipe)).blocks[1].branches[0]
    with taylorseer.apply(pipe, config):
        branch.module.register_forward_hook(lambda m, args, out: gave.append(out[0] if isinstance(out, tuple) else out))
        family.run(pipe, steps=10)
    calls, full = len(gave) // 10, full_steps(10, interval=4, first_enhance=3)
    assert full == [0, 1, 2, 6]
    for call in range(calls):
        f = gave[call::calls]
        first = f[2] - f[1]                                        # step 1 had no difference yet: the second one is not known
        second = ((f[6] - f[2]) / 4 - first) / 4
        for k in (1, 2, 3):
            torch.testing.assert_close(f[2 + k], f[2] + k * first, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(f[6 + k], f[6] + k * (f[6] - f[2]) / 4 + k * k / 2 * second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_order_zero_reuses(name):
    """As FORA does when it counts from the start."""
    family, outs = FAMILIES[name], []
    for method, config in ((fora, fora.Config(interval=3, count_from="start")),
                           (taylorseer, taylorseer.Config(interval=3, max_order=0, first_enhance=1))):
        pipe = family.pipe()
        with method.apply(pipe, config):
            outs.append(family.run(pipe, steps=8))
    assert torch.equal(*outs)


def test_forecast_steps_run_no_linear_of_attention_or_mlp_and_every_modulation():
    pipe = FAMILIES["dit"].pipe()
    blocks, ran = pipe.transformer.transformer_blocks, {}
    inner = [layer for b in blocks for layer in (b.attn1.to_q, b.attn1.to_out[0], b.ff.net[0].proj, b.ff.net[2])]
    gates = [b.norm1.linear for b in blocks]
    with taylorseer.apply(pipe, QUICK) as patch:
        for layer in inner + gates:
            layer.register_forward_hook(lambda m, *_: ran.update({m: ran.get(m, 0) + 1}))
        FAMILIES["dit"].run(pipe, steps=9)
        assert patch.report()["computed"] == 4 * 2 * len(blocks) and patch.report()["forecast"] == 5 * 2 * len(blocks)
    assert {ran[layer] for layer in inner} == {4} and {ran[gate] for gate in gates} == {9}


# Shenyi-Z/TaylorSeer@288776dfd0cb, its DiT with the weights of `authors_dit`, N = 4 and O = 2 over 9 steps, double precision
OFFICIAL = [[0.802533, 0.935879], [0.884436, 0.994834], [0.743347, 0.966456], [0.5799, 0.856536], [0.623323, 0.888593],
            [0.743512, 0.878048], [0.675014, 0.880653], [0.736815, 0.839801], [0.710716, 0.81495]]


def test_equals_the_official_code():
    pipe = authors_dit.pipeline(layers=2)
    with taylorseer.apply(pipe, taylorseer.Config(interval=4, max_order=2, first_enhance=2)):
        ours = authors_dit.answers(pipe, 9)
    torch.testing.assert_close(ours, torch.tensor(OFFICIAL, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_bare_model_counts_its_calls():
    """A run from the same noise: what the pipeline's steps are, calls are here, until a reset."""
    model, outs = FAMILIES["pixart"].pipe().transformer, []
    x, text = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((1, 4, 8, 8), (1, 5, 16)))
    with taylorseer.apply(model, QUICK) as patch:
        for _ in range(2):
            outs.append([model(x, text, timestep=torch.tensor([900 - 100 * i]), return_dict=False)[0] for i in range(5)])
            assert patch.report()["state"] == "engaged" and patch.report()["saved"] == 0.4
            patch.reset()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_run_of_full_steps_is_no_gain():
    pipe = FAMILIES["dit"].pipe()
    with taylorseer.apply(pipe) as patch:
        assert torch.equal(FAMILIES["dit"].run(pipe, steps=3), contract.plain("dit", steps=3))
        assert patch.report()["state"] == "no gain" and patch.report()["reason"] == "the first 3 steps are full"


@pytest.mark.parametrize("name, order", [("dit", 1), ("dit", 4), ("sd3", 2), ("flux", 1), ("latte", 1)])
def test_blocks_compile_whole(name, order):
    family, outs = FAMILIES[name], []
    for compiled in (False, True):
        pipe = family.pipe()
        torch._dynamo.reset()
        config = taylorseer.Config(interval=3, max_order=order, first_enhance=2)
        limits = dict(fail_on_recompile_limit_hit=True, recompile_limit=16 if name == "latte" else 8)   # two kinds of block
        with taylorseer.apply(pipe, config), torch._dynamo.config.patch(**limits):
            for block in describe(Family.model(pipe)).blocks if compiled else ():
                block.module.compile(fullgraph=True, backend="aot_eager")
            outs.append(family.run(pipe, steps=14))
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            family.run(pipe, steps=14, seed=1)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"max_order": -1}, {"first_enhance": 0}])
def test_bad_values_are_named(wrong):
    with pytest.raises(ValueError, match=next(f"{name}={value}" for name, value in wrong.items())):
        taylorseer.Config(**wrong)
