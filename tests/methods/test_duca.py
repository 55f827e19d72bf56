import pytest
import torch
import two_calls
from contracts import patch as contract
from families import FAMILIES, Family

from methods import duca, toca
from methods._core.denoiser import describe
from methods.duca import Config

SERVED = ["dit", "pixart", "latte", "flux"]


@pytest.mark.parametrize("check, case", contract.cases(duca, Config(fresh=0.3)), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("interval, expected", [(2, "FFcFcFcFcFcFcFcFcFcF"), (3, "FFAcFAcFAcFAcFAcFAcF"),
                                                (4, "FAcFcAcFcAcFcAcFcAcF"), (5, "FcAcFAcAcFAcAcFAcAcF")])
def test_cycles_of_dit_with_a_constant_interval(interval, expected):
    assert duca.kinds(20, interval, "dit-ddim") == expected


def test_other_cycles():
    assert duca.kinds(9, 3, "pixart") == "FcAFcAFcA" and duca.kinds(9, 4, "pixart") == "FcAcFcAcF"
    assert duca.kinds(9, 3, "open-sora") == "FFFFcAFcA" and duca.kinds(8, 2, "pixart") == "FcFcFcFc"
    full = [i for i, _ in toca.full_steps(50, 3, "dit-ddim")]
    adaptive = duca.kinds(50, 3, "dit-ddim", adaptive=True)
    assert [i for i, kind in enumerate(adaptive) if kind == "F"] == full and adaptive.endswith("FcF")


def watched(pipe):
    """Calls of the first norm of each block, and what enters the tail, call by call."""
    denoiser, ran, entered = describe(Family.model(pipe)), [], []
    denoiser.model.register_forward_pre_hook(lambda *_: ran.append(0))
    for block in denoiser.blocks:
        block.norm.register_forward_hook(lambda *_: ran.append(ran.pop() + 1))
    denoiser.tail.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    return len(denoiser.blocks), ran, entered


@pytest.mark.parametrize("name", SERVED)
def test_an_aggressive_step_runs_no_block_and_hands_on_the_last_hidden_state(name):
    """Behind a conservative step it is the conservative one's, not that of the full step."""
    family = FAMILIES[name]
    pipe = family.pipe()
    blocks, ran, entered = watched(pipe)
    with duca.apply(pipe, Config(interval=4, fresh=0.3)) as patch:
        family.run(pipe, steps=10, batch=2)
        report = patch.report()
    schedule = toca.schedule_of(describe(Family.model(FAMILIES[name].pipe())).blocks)
    cycle = duca.kinds(10, 4, schedule, adaptive=schedule != "pixart")
    assert ran == [0 if kind == "A" else blocks for kind in cycle] and "A" in cycle and "cA" in cycle
    assert report["full"] == cycle.count("F") and report["aggressive"] == cycle.count("A")
    for i, kind in enumerate(cycle):
        if i:
            assert torch.equal(entered[i], entered[i - 1]) == (kind == "A"), i


def test_the_final_layer_sees_the_timestep_at_hand():
    """The output of an aggressive step is the model's tail on the kept state, under its own timestep."""
    pipe, inputs, outs = FAMILIES["dit"].pipe(), [], []
    model = pipe.transformer
    _, _, entered = watched(pipe)
    model.register_forward_pre_hook(lambda m, args, kwargs: inputs.append(kwargs["timestep"]), with_kwargs=True)
    model.proj_out_2.register_forward_hook(lambda m, args, out: outs.append(out))
    with duca.apply(pipe, Config(interval=3, fresh=0.3)) as patch:
        labels = []
        patch.each_call(lambda context: labels.append(context.inputs["class_labels"]))
        FAMILIES["dit"].run(pipe, steps=12)
    i = duca.kinds(12, 3, "dit-ddim", adaptive=True).index("A")
    time = model.transformer_blocks[0].norm1.emb(inputs[i], labels[i], hidden_dtype=torch.float32)
    shift, scale = model.proj_out_1(torch.nn.functional.silu(time)).chunk(2, 1)
    by_hand = model.proj_out_2(model.norm_out(entered[i - 1]) * (1 + scale[:, None]) + shift[:, None])
    assert torch.equal(by_hand, outs[i]) and not torch.equal(outs[i], outs[i - 1])


@pytest.mark.parametrize("name", ["flux", "latte"])
def test_an_interval_of_two_is_toca(name):
    """There is no aggressive step; on PixArt and DiT ToCa shortens its cycle, or has another bonus."""
    outs = []
    for method, config in ((duca, Config(interval=2, fresh=0.4)), (toca, toca.Config(interval=2, fresh=0.4))):
        pipe = FAMILIES[name].pipe()
        with method.apply(pipe, config) as patch:
            outs.append(FAMILIES[name].run(pipe, steps=8, batch=2))
            assert patch.counts["aggressive"] == 0 and patch.counts["rows"] > 0
    assert torch.equal(*outs)


def test_small_values_by_hand():
    q, k, v = torch.randn(3, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    out, score = duca.small_values(q, k, v)
    expected = [[sum(1 - float((v[b, h, n] ** 2).sum() ** 0.5) for h in range(3)) for n in range(4)] for b in range(2)]
    torch.testing.assert_close(score, torch.tensor(expected))
    torch.testing.assert_close(out, (q @ k.mT / 5 ** 0.5).softmax(-1) @ v)


def test_random_scores_are_equal_in_both_halves_and_come_from_the_seed():
    a, b = (duca.drawn(torch.zeros(4, 7), 2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(a[:2], a[2:]) and not torch.equal(a[0], a[1]) and 0 <= a.min() and a.max() < 1
    outs = []
    for seed in (0, 0, 1):
        pipe = FAMILIES["dit"].pipe()
        with duca.apply(pipe, Config(score="random", fresh=0.3, seed=seed)):
            outs.append(FAMILIES["dit"].run(pipe, steps=9))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_the_scores_choose_different_tokens():
    outs = []
    for score in duca.SCORES:
        pipe = FAMILIES["pixart"].pipe()
        with duca.apply(pipe, Config(score=score, fresh=0.3)):
            outs.append(FAMILIES["pixart"].run(pipe, steps=8))
    assert all(not torch.equal(a, b) for a, b in zip(outs, [*outs[1:], outs[0]], strict=True))


def test_all_tokens_renewed_leave_only_attention_stale():
    """With a share of one, steps of N = 2 differ from the plain ones by their attention alone."""
    pipe, seen = FAMILIES["pixart"].pipe(), []
    pipe.transformer.transformer_blocks[0].ff.net[0].proj.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    with duca.apply(pipe, Config(interval=2, fresh=1.0)):
        FAMILIES["pixart"].run(pipe, steps=4)
    assert seen == [seen[0]] * 4


@pytest.mark.parametrize("score", duca.SCORES)
def test_guidance_in_two_calls_gives_the_same(score):
    (one, first), (two, second) = two_calls.both(duca, Config(fresh=0.3, score=score), "dit")
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    assert second["aggressive"] == 2 * first["aggressive"] > 0 and first["saved"] == second["saved"]


@pytest.mark.parametrize("wrong, named", [({"interval": 0}, "interval=0"), ({"fresh": 1.5}, "fresh=1.5"),
                                          ({"score": "norm"}, "score='norm'"), ({"schedule": "sd"}, "schedule='sd'")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="no chain of blocks over one latent"):
        duca.apply(FAMILIES["unet"].pipe())
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        duca.apply(FAMILIES["dit"].pipe().transformer)
    assert duca.apply(FAMILIES["dit"].pipe(), duca.OFF).off
