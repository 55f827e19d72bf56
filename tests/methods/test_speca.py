from dataclasses import replace

import authors_dit
import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family

from methods import speca, taylorseer
from methods._core.denoiser import describe

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]
FLUX, DIT = speca.Config(), speca.Config(threshold=0.1, decay=0.01, floor=0.01, longest=5, max_order=4)
VIDEO = speca.Config(threshold=1.0, decay=0.1, shortest=4, longest=12, max_order=1, first_enhance=1)
NEVER, ALWAYS = 0.0, float("inf")


@pytest.mark.parametrize("check, case", contract.cases(speca, speca.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def steps_of(config, error, steps=50):
    """(full steps, how many are verified) where every verification measures the same error."""
    draft, full, verified = speca.Draft(), [], 0
    for i in range(steps):
        due, check = draft.due(i, steps, config), draft.checked(config)
        draft = draft.after(i, due, config)
        if due:
            full.append(i)
        elif check:
            draft, verified = replace(draft, error=error), verified + 1
    return full, verified


@pytest.mark.parametrize("config, error, full, verified", [
    (FLUX, NEVER, [0, 2, 11, 20, 29, 38, 47], 30), (FLUX, ALWAYS, [0, *range(2, 50, 4)], 12),
    (DIT, NEVER, [0, 2, 8, 14, 20, 26, 32, 38, 44], 24), (DIT, ALWAYS, [0, *range(2, 50, 4)], 12),
    (VIDEO, NEVER, [0, 13, 26, 39], 30), (VIDEO, ALWAYS, [*range(0, 50, 6)], 8),
])
def test_full_steps(config, error, full, verified):
    assert steps_of(config, error) == (full, verified)


@pytest.mark.parametrize("config", [FLUX, DIT, VIDEO, speca.Config(first_enhance=9)])
@pytest.mark.parametrize("error", [NEVER, 0.3, 3.0, ALWAYS])
def test_a_draft_is_at_least_one_and_at_most_the_longest_step(config, error):
    full, _ = steps_of(config, error)
    gaps = [b - a for a, b in zip(full, full[1:], strict=False)]
    assert min(gaps) >= 2 and max(gaps) <= config.longest + 1
    behind = [gap for i, gap in zip(full[1:], gaps, strict=True) if i >= config.first_enhance]
    assert min(behind) >= min(config.shortest + 2, config.longest + 1)


@pytest.mark.parametrize("config, expected", [
    (FLUX, {0: 7.0, 10: 5.502, 25: 3.834, 49: 2.151}), (DIT, {0: 0.1, 25: 0.01, 49: 0.01})])
def test_the_threshold_falls_to_its_floor(config, expected):
    assert {i: speca.threshold(i, 50, config) for i in expected} == pytest.approx(expected, abs=1e-3)
    assert speca.threshold(10, 40, DIT) == pytest.approx(0.0316, abs=1e-4)


def test_metrics_by_hand():
    a, b = torch.tensor([[1.1, 2.2]]), torch.tensor([[1.0, 2.0]])
    found = {name: float(metric(a, b)) for name, metric in speca.METRICS.items()}
    expected = {"relative_l1": 0.1, "relative_l2": 0.1, "norm": 0.1, "l1": 0.15, "l2": 0.158114, "cosine": 0.0}
    assert found == pytest.approx(expected, abs=1e-6)
    assert float(speca.METRICS["cosine"](torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))) == 1.0


class watched:
    """Notes what is compared."""

    def __enter__(self):
        self.patched, seen = pytest.MonkeyPatch(), []
        plain = speca.METRICS["relative_l1"]

        def note(a, b):
            seen.append((a, b))
            return plain(a, b)

        self.patched.setitem(speca.METRICS, "relative_l1", note)
        return seen

    def __exit__(self, *_):
        self.patched.undo()
        return False


# Shenyi-Z/Cache4Diffusion@91a1949, its DiT with the weights of `authors_dit` and the rule below over 12 steps, double precision
OFFICIAL = [[0.759096, 0.99095], [0.616636, 0.850445], [0.647494, 0.829819], [0.766815, 0.908453], [0.805291, 0.940932],
            [0.791058, 0.949085], [0.658341, 0.860381], [0.724156, 0.861438], [0.743128, 0.888914], [0.645861, 0.824806],
            [0.728099, 0.86899], [0.663365, 0.820208]]
ERRORS = [0.0657, 0.0499, 0.2472, 0.0618, 0.0305, 0.0715]


def test_equals_the_official_code():
    """There the present step counts as done, so that the first threshold is already lower."""
    pipe = authors_dit.pipeline(layers=2)
    config = speca.Config(threshold=0.1 * 0.5 ** (1 / 12), decay=0.5, floor=0.01, shortest=1, longest=4, first_enhance=2)
    with speca.apply(pipe, config) as patch, watched() as seen:
        ours = authors_dit.answers(pipe, 12)
        report = patch.report()
    torch.testing.assert_close(ours, torch.tensor(OFFICIAL, dtype=torch.float64), atol=1e-6, rtol=0)
    assert report["computed"] == 3 * 4 and report["rejected"] == 1
    assert [float(speca.METRICS["relative_l1"](a, b)) for a, b in seen] == pytest.approx(ERRORS, abs=1e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_the_last_block_is_compared_with_itself_computed_from_the_forecast(name):
    family, given, gave = FAMILIES[name], [], []
    pipe, plain = family.pipe(), describe(Family.model(family.pipe()))
    last = describe(Family.model(pipe)).blocks[-1]
    fresh, total = plain.blocks[-1], next((branch for branch in last.branches if branch.name == "total"), None)
    with speca.apply(pipe, speca.Config(shortest=1, longest=3, threshold=1e9)) as patch, watched() as seen:
        last.module.register_forward_pre_hook(lambda m, args, kwargs: given.append((args, dict(kwargs))), with_kwargs=True)
        last.module.register_forward_hook(lambda m, args, out: gave.append(out))
        family.run(pipe, steps=8)
        report = patch.report()
    calls = len(given) // 8
    verified = [4, 5]                                               # full: 0, 2, 6; the first step of a draft is not verified
    assert report["verified"] == len(seen) == len(verified) * calls
    found = []
    if total is not None:
        next(b for b in fresh.branches if b.name == "total").module.register_forward_hook(lambda m, a, out: found.append(out))
    for n, (drafted, computed) in enumerate(seen):
        i = verified[n // calls] * calls + n % calls
        args, kwargs = given[i]
        with torch.no_grad():
            out = fresh.module(*args, **kwargs)
        torch.testing.assert_close(computed, found[-1] if total is not None else fresh.split(out)[0], atol=1e-5, rtol=1e-5)
        if total is None:
            assert torch.equal(drafted, last.split(gave[i])[0])
        assert not torch.allclose(drafted, computed, atol=1e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_verification_leaves_the_result_alone(name):
    """Without a rejection it is TaylorSeer with the same full steps, bit for bit."""
    family, outs, longest = FAMILIES[name], [], 2
    settings = [(speca, speca.Config(threshold=1e9, shortest=shortest, longest=longest, max_order=1, first_enhance=1))
                for shortest in (1, 9)]
    for method, config in (*settings, (taylorseer, taylorseer.Config(interval=longest + 1, max_order=1, first_enhance=1))):
        pipe = family.pipe()
        with method.apply(pipe, config) as patch:
            outs.append(family.run(pipe, steps=8))
            assert patch.report().get("verified", 0) % 2 == 0
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_failed_step_is_kept_and_the_next_is_full():
    pipe, kinds = FAMILIES["dit"].pipe(), []
    layer = describe(pipe.transformer).blocks[0].attn.to_q
    with speca.apply(pipe, speca.Config(threshold=0.0, floor=0.0, shortest=2, longest=8)) as patch:
        layer.register_forward_hook(lambda *_: kinds.append(1))
        FAMILIES["dit"].run(pipe, steps=14)
        report = patch.report()
    assert report["rejected"] == 2 and report["verified"] == 3       # full: 0, 2, 6, 10; verified: 5, 9, 13
    assert len(kinds) == 4


def test_what_verifies_counts_as_computed():
    pipe = FAMILIES["dit"].pipe()
    branches, blocks = 2 * len(pipe.transformer.transformer_blocks), 1
    with speca.apply(pipe, speca.Config(threshold=1e9, shortest=1, longest=3)) as patch:
        FAMILIES["dit"].run(pipe, steps=6)
        report = patch.report()
    assert report["forecast"] == 4 * branches and report["verified"] == 2      # full: 0, 2; verified: 4, 5
    assert report["saved"] == pytest.approx((4 * branches - 2 * 2 * blocks) / (6 * branches), abs=1e-4)


def test_cost_falls_and_distance_grows_along_the_threshold():
    plain, computed, distances = contract.plain("sd3", steps=24), [], []
    for bound in (0.0, 0.3, 1e9):
        pipe = FAMILIES["sd3"].pipe()
        config = speca.Config(threshold=bound, decay=1.0, floor=0.0, shortest=1, first_enhance=1, max_order=1, metric="norm")
        with speca.apply(pipe, config) as patch:
            distances.append(float((FAMILIES["sd3"].run(pipe, steps=24) - plain).square().mean()))
            computed.append(patch.report()["computed"])
    assert computed == sorted(computed, reverse=True) and computed[0] > computed[-1]
    assert distances == sorted(distances) and 0 < distances[0] < distances[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "flux", "latte"])
def test_blocks_compile_whole(name):
    config = speca.Config(shortest=1, longest=2, threshold=1e9)
    with torch._dynamo.config.patch(recompile_limit=16 if name == "latte" else 8):       # Latte has two kinds of block
        reports = contract.compiled_blocks_agree(contract.Case(speca, config, FAMILIES[name]), steps=9)
    assert all(report["verified"] > 0 for report in reports)


def test_a_bare_model_is_refused():
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        speca.apply(FAMILIES["dit"].pipe().transformer)


@pytest.mark.parametrize("wrong", [{"threshold": -1}, {"decay": -0.1}, {"floor": -1}, {"shortest": 0}, {"longest": -1},
                                   {"max_order": -1}, {"first_enhance": 0}, {"metric": "l3"}])
def test_bad_values_are_named(wrong):
    with pytest.raises(ValueError, match=next(f"{name}={value!r}" for name, value in wrong.items())):
        speca.Config(**wrong)
