import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from contracts import patch as contract
from families import FAMILIES, FIRST

from methods import ditfastattn, pfdiff
from methods._core.attention import band_share, banded
from methods.ditfastattn import METHODS, Config

EVERY = Config(plan=["full", "window+guidance", "share", "window", "guidance"])


@pytest.mark.parametrize("check, case", contract.cases(ditfastattn, Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


COST = (contract.on_changes_the_result_and_costs_less, contract.engaged_means_cheaper, contract.what_is_kept_can_be_limited,
        contract.what_is_said_to_be_skipped_is_not_run, contract.runs_leave_nothing_behind)


@pytest.mark.parametrize("check, case", [(check, case) for check, case in contract.cases(ditfastattn, EVERY) if check in COST],
                         ids=contract.name)
def test_contract_of_a_plan_with_every_method(check, case):
    check(case)


# ---- the equations ----------------------------------------------------------------------------------------------------

def attention(n, text, seed=0):
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, n, 4, generator=made, dtype=torch.float64) for _ in range(3))
    return q, k, v, *(torch.randn(2, 3, text, 4, generator=made, dtype=torch.float64) for _ in range(2))


def by_hand(q, k, v, k_text, v_text, window):
    rows = []
    for i in range(q.shape[2]):
        near = slice(max(0, i - window), i + window + 1)
        keys, values = (torch.cat([x[:, :, near], t], 2) for x, t in ((k, k_text), (v, v_text)))
        rows.append(((q[:, :, i:i + 1] @ keys.mT) * 4 ** -0.5).softmax(-1) @ values)
    return torch.cat(rows, 2)


@pytest.mark.parametrize("n, window, text", [(64, 8, 0), (30, 4, 5), (17, 1, 0), (25, 3, 2), (12, 5, 3), (9, 8, 0), (9, 40, 1)])
def test_a_band_is_attention_to_the_near_tokens_and_the_text(n, window, text):
    q, k, v, *words = attention(n, text)
    out = banded(F.scaled_dot_product_attention, q, k, v, window, *words)
    torch.testing.assert_close(out, by_hand(q, k, v, *words, window))
    if window >= n - 1:
        whole = F.scaled_dot_product_attention(q, torch.cat([k, words[0]], 2), torch.cat([v, words[1]], 2))
        torch.testing.assert_close(out, whole)


@pytest.mark.parametrize("n, window, pairs", [(64, 8, 64 * 24), (30, 4, 32 * 12), (12, 5, 12 * 12), (1024, 128, 1024 * 384)])
def test_what_a_band_computes(n, window, pairs):
    computed = []

    def product(q, k, v, **more):
        computed.append(q[0, ..., 0].numel() * k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, **more)

    q, k, v, *words = (x[:1, :1] for x in attention(n, 0))
    banded(product, q, k, v, window, *words)
    assert computed == [pairs] and band_share(n, window) == pairs / n ** 2


def test_when_a_residual_is_kept():
    column = ["full", "window", "full", "share", "window"]
    assert [ditfastattn.needs_residual(column, i) for i in (0, 2)] == [True, True]
    assert not ditfastattn.needs_residual(["full", "guidance", "window"], 0)
    assert ditfastattn.needs_residual(["full", "guidance", "window+guidance"], 1)
    assert not ditfastattn.needs_residual(["full", "share", "share"], 0)


def test_thresholds_grow_with_depth():
    found = ditfastattn.thresholds(0.05, 28)
    assert len(found) == 28 and found[0] == pytest.approx(0.0017857, abs=1e-7) and found[-1] == pytest.approx(0.05)


def test_the_loss_by_hand():
    full, other = torch.tensor([2.0, -1.0, 0.0, 4.0]), torch.tensor([1.0, -4.0, -1.0, 4.0])
    assert ditfastattn.loss(full, other) == pytest.approx((0.5 + 3 + 10 + 0) / 4, abs=1e-5)     # 1 / 1e-6 is cut to 10


# ---- on a model -------------------------------------------------------------------------------------------------------

def watched(name, plan, steps=None, **setting):
    """What each attention gives in every step, and how many rows its query projection gets."""
    pipe, given, rows = FAMILIES[name].pipe(), [], []
    with ditfastattn.apply(pipe, Config(plan=plan, **setting)) as patch:
        for block in pipe.transformer.transformer_blocks:
            block.attn1.register_forward_hook(lambda m, a, out: given.append(out))
            block.attn1.to_q.register_forward_hook(lambda m, a, out: rows.append(len(out)))
        out = FAMILIES[name].run(pipe, steps=steps or len(plan))
        return given, rows, patch.report(), out


def test_a_shared_step_gives_the_same_tensor_and_projects_nothing():
    given, rows, report, _ = watched("dit", ["full", "share", "share", "full"])
    for step in (1, 2):
        assert all(torch.equal(given[3 * step + n], given[n]) for n in range(3))
    assert not torch.equal(given[9], given[0])
    assert rows == [2] * 6 and report["share"] == 6 and report["saved"] == 0.5


HALVES = pytest.mark.parametrize("name, cond", [("dit", 0), ("pixart", 1)])      # DiT's pipeline puts the conditional one first


@HALVES
def test_guidance_computes_the_conditional_half_for_both(name, cond):
    pipe, seen = FAMILIES[name].pipe(), []
    with ditfastattn.apply(pipe, Config(plan=["full", "guidance"])):
        attn = pipe.transformer.transformer_blocks[1].attn1
        attn.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        attn.to_q.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        attn.register_forward_hook(lambda m, a, out: seen.append(out))
        FAMILIES[name].run(pipe, steps=2)
    whole, given, out, *now = seen
    assert torch.equal(whole, given) and not torch.equal(out[0], out[1])
    assert torch.equal(now[1], now[0][cond:cond + 1]) and not torch.equal(now[0][0], now[0][1])
    assert len(now[2]) == 2 and torch.equal(now[2][0], now[2][1])


@HALVES
@pytest.mark.parametrize("word", ["window", "window+guidance"])
def test_a_window_adds_the_residual_of_the_last_full_step(name, cond, word):
    """O_k = W_k + O_r - W_r by hand, from what the projections gave; with guidance for the conditional half."""
    pipe, seen = FAMILIES[name].pipe(), []

    def heads(x):
        seen.append(x.unflatten(-1, (2, 16)).transpose(1, 2))
    with ditfastattn.apply(pipe, Config(plan=["full", word], window=0.1)):
        attn = pipe.transformer.transformer_blocks[1].attn1
        for part in (attn.to_q, attn.to_k, attn.to_v):
            part.register_forward_hook(lambda m, a, out: heads(out))
        attn.to_out[0].register_forward_pre_hook(lambda m, a: heads(a[0]))
        FAMILIES[name].run(pipe, steps=2)
    *old, full = seen[:4]
    *now, out = seen[4:]
    place = torch.arange(64)
    near = (place[:, None] - place).abs() <= 6
    residual = full - F.scaled_dot_product_attention(*old, attn_mask=near)
    expected = F.scaled_dot_product_attention(*now, attn_mask=near) + (residual if word == "window" else residual[[cond]])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FIRST)
def test_a_window_after_its_full_step_returns_the_same_for_the_same_input(name):
    family = FAMILIES[name]
    pipe, given = family.pipe(), []
    model, scheduler = family.model(pipe), pipe.scheduler
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    family.run(pipe, steps=2)
    hook.remove()
    (args, kwargs), outs = given[0], []
    with ditfastattn.apply(pipe, Config(plan=["full", "window"])) as patch:
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            outs.append(model(*args, **kwargs)[0])
            scheduler.step(torch.zeros(1, 4, 4, 4), t, torch.zeros(1, 4, 4, 4))
        assert patch.report()["window"] == patch.report()["full"] > 0
    torch.testing.assert_close(*outs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "cogvideox", "latte"])
def test_a_window_over_everything_is_the_plain_run(name):
    pipe, family = FAMILIES[name].pipe(), FAMILIES[name]
    with ditfastattn.apply(pipe, Config(plan=["full", "window", "window"], window=1.0)) as patch:
        out = family.run(pipe, steps=3)
        assert patch.report()["window"] == 2 * patch.report()["full"] and patch.report()["state"] == "no gain"
    torch.testing.assert_close(out, contract.plain(name, steps=3), atol=1e-4, rtol=1e-3)


def test_without_guidance_its_methods_compute_everything():
    pipe = FAMILIES["dit"].pipe()
    with ditfastattn.apply(pipe, Config(plan=["full", "window+guidance", "guidance"])) as patch:
        FAMILIES["dit"].run(pipe, steps=3, guidance=1.0)
        report = patch.report()
    assert (report["full"], report["window"]) == (6, 3)


def test_a_plan_is_read_in_proportion():
    given, *_ = watched("dit", [["full"] * 3, ["full", "share", "full"]], steps=5)
    assert [torch.equal(given[3 * step + 1], given[3 * step - 2]) for step in range(1, 5)] == [False, False, True, True]


# ---- search -----------------------------------------------------------------------------------------------------------

def deterministic():
    """A DiT whose weights are arithmetic."""
    pipe = FAMILIES["dit"].pipe(layers=3)
    pipe.transformer.double()
    for n, parameter in enumerate(pipe.transformer.parameters()):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + n)
        parameter.copy_(0.1 * wave.view(parameter.shape))
    return pipe


def answers(pipe):
    """One number per step and guidance half of the denoiser's output, (8, 2)."""
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: seen.append(out.sample[:, 1, 2, 3]))
    pipe([3], num_inference_steps=8, guidance_scale=4.0, generator=torch.Generator().manual_seed(0), output_type="np")
    hook.remove()
    return torch.stack(seen)


# thu-nics/DiTFastAttn@91bfbae: plan and run of transform_model_fast_attention with this model, 8 on each side of 64 tokens, and
# attention with a mask in place of FlashAttention's window
SEARCHED = {
    0.002: (["full"] * 3, ["guidance"] * 3, ["guidance"] * 3, ["guidance", "guidance", "window+guidance"],
            ["window+guidance", "window+guidance", "guidance"], ["window", "guidance", "window+guidance"],
            ["share"] * 3, ["share"] * 3),
    0.01: (["full"] * 3, ["guidance", "window+guidance", "window+guidance"], ["guidance", "guidance", "window+guidance"],
           ["window+guidance", "share", "share"], *[["share"] * 3] * 4)}
OFFICIAL = {
    0.002: [[0.23700894, 0.27087685], [0.16900978, 0.18667686], [0.14226808, 0.14984580], [0.14258222, 0.14614812],
            [0.13252117, 0.13427558], [0.13371061, 0.13473478], [0.13008826, 0.13074848], [0.12498538, 0.12547958]],
    0.01: [[0.23700894, 0.27087685], [0.16872420, 0.18644181], [0.14223675, 0.14982056], [0.14261728, 0.14617419],
           [0.13259930, 0.13433990], [0.13377718, 0.13479208], [0.13013202, 0.13078449], [0.12502186, 0.12550863]]}


@pytest.mark.parametrize("delta", SEARCHED)
def test_search_and_run_equal_the_official_code(delta, tmp_path):
    pipe, file = deterministic(), tmp_path / "plan.json"
    plain = answers(pipe)
    plan = ditfastattn.calibrate(pipe, lambda: answers(pipe), delta=delta, save=file)
    assert plan == list(SEARCHED[delta]) == json.loads(file.read_text())
    assert torch.equal(answers(pipe), plain)                     # the search takes itself off
    with ditfastattn.apply(pipe, Config(plan=file)) as patch:
        ours = answers(pipe)
        report = patch.report()
    torch.testing.assert_close(ours, torch.tensor(OFFICIAL[delta], dtype=torch.float64), atol=1e-8, rtol=0)
    words = list(itertools.chain(*plan))
    assert {word: words.count(word) for word in words} == {word: report[word] for word in METHODS if word in report}


def test_without_error_everything_stays_full():
    pipe = deterministic()
    assert ditfastattn.calibrate(pipe, lambda: answers(pipe), delta=0.0) == [["full"] * 3] * 8


def test_a_stopped_search_goes_on_where_it_stopped(tmp_path):
    whole, journal = tmp_path / "whole", tmp_path / "journal"
    pipe, told = deterministic(), []
    plan = ditfastattn.calibrate(pipe, lambda: answers(pipe), delta=0.002, journal=whole)
    lines = whole.read_text().splitlines()

    def stop(line):
        told.append(line)
        if len(told) == 20:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        ditfastattn.calibrate(pipe, lambda: answers(pipe), delta=0.002, journal=journal, tell=stop)
    assert journal.read_text().splitlines() == lines[:20] and len(lines) > 20
    assert ditfastattn.calibrate(pipe, lambda: answers(pipe), delta=0.002, journal=journal, tell=told.append) == plan
    assert journal.read_text().splitlines() == lines and len(told) == len(lines)


def test_search_without_guidance_tries_what_does_not_need_it():
    pipe = FAMILIES["dit"].pipe()
    plan = ditfastattn.calibrate(pipe, lambda: FAMILIES["dit"].run(pipe, steps=3, guidance=1.0), delta=0.2)
    assert {word for row in plan for word in row} <= {"full", "share", "window"} != {"full"}


# ---- what is refused ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, named", [
    ({"window": 0}, "window=0"), ({"window": 1.5}, "window=1.5"), ({"plan": ["share"]}, "first step"),
    ({"plan": []}, "first step"), ({"plan": ["full", ["half"]]}, "'half' must be one of")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_a_plan_for_another_model_and_a_bare_model_are_refused():
    pipe = FAMILIES["dit"].pipe()
    with pytest.raises(ValueError, match="the plan has 2 blocks, this DiTTransformer2DModel 3"):
        ditfastattn.apply(pipe, Config(plan=["full", ["full", "share"]]))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        ditfastattn.apply(pipe.transformer)
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        ditfastattn.calibrate(pipe.transformer, lambda: None)


@pytest.mark.parametrize("other, reason", [(ditfastattn, "already on"), (pfdiff, "leaves room for nobody else")])
def test_search_stands_alone(other, reason):
    pipe = FAMILIES["dit"].pipe()
    with other.apply(pipe), pytest.raises(ValueError, match=reason):
        ditfastattn.calibrate(pipe, lambda: None)


def test_a_plan_of_many_kinds_of_step_compiles_whole():
    """"full" and "guidance" with a residual or without: seven kinds, more than the compiler allows by default."""
    plan = ["full", "window+guidance", "share", "window", "guidance", "window", "full", "share"]
    family, config = FAMILIES["dit"], ditfastattn.Config(plan=plan)
    eager, pipe = family.pipe(), family.pipe()
    with ditfastattn.apply(eager, config):
        expected = family.run(eager, steps=8)
    torch._dynamo.reset()
    for block in pipe.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=16, fail_on_recompile_limit_hit=True), ditfastattn.apply(pipe, config):
        torch.testing.assert_close(family.run(pipe, steps=8), expected, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()
