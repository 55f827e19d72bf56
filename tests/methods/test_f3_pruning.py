import json

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES
from sequential import in_two_calls

from accel_tools.measure.macs import count_macs
from methods import f3_pruning
from methods._core.attention import mean_map
from methods.f3_pruning import Config

LATTE = FAMILIES["latte"]


@pytest.mark.parametrize("check, case", contract.cases(f3_pruning, Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


# ---- the score --------------------------------------------------------------------------------------------------------

def test_scores_by_hand():
    assert float(f3_pruning.score(torch.tensor([[.9, .1], [.4, .6]]))) == pytest.approx(0.25)
    assert float(f3_pruning.score(torch.tensor([[.5, .5], [.2, .8]]))) == pytest.approx(0.35)
    assert f3_pruning.pruned([0.25, 0.35], 0.5) == {0}
    assert float(f3_pruning.score(torch.full((3, 8, 8), 1 / 8))) == pytest.approx(7 / 8)
    assert float(f3_pruning.score(torch.eye(8).expand(3, 8, 8))) == 0


def test_the_score_by_a_loop():
    q, k = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    total = 0.0
    for b in range(3):
        for h in range(2):
            for i in range(5):
                row = [float(torch.exp(q[b, h, i] @ k[b, h, j] / 2)) for j in range(5)]
                total += sum(row[:i] + row[i + 1:]) / sum(row)
    found = f3_pruning.score(mean_map(q, k))
    assert float(found) == pytest.approx(total / 30, rel=1e-5)
    places = torch.randperm(3)
    torch.testing.assert_close(f3_pruning.score(mean_map(q[places], k[places])), found)


def test_less_is_pruned_at_a_lower_ratio():
    scores = torch.rand(10, generator=torch.Generator().manual_seed(0)).tolist()
    sets = [f3_pruning.pruned(scores, n / 10) for n in range(11)]
    assert [len(each) for each in sets] == list(range(11)) and all(a < b for a, b in zip(sets, sets[1:], strict=False))
    assert f3_pruning.pruned([0.5] * 4, 0.5) == {0, 1}


# ---- the model --------------------------------------------------------------------------------------------------------

def ran(pipe):
    """Numbers of the temporal attentions that really run, call by call."""
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append([]))
    for n, block in enumerate(pipe.transformer.temporal_transformer_blocks):
        block.attn1.to_q.register_forward_hook(lambda *_, n=n: calls[-1].append(n))
    return calls


def by_hand(pipe, without):
    """Latte whose temporal attentions `without` add nothing."""
    for n in without:
        pipe.transformer.temporal_transformer_blocks[n].attn1.forward = lambda x, **_: x * 0
    return pipe


@pytest.mark.parametrize("scores, ratio, without", [((3, 1, 2, 0), 0.5, {1, 3}), ((0, 1, 2, 3), 0.3, {0}),
                                                    ((1, 1, 0, 1), 1.0, {0, 1, 2, 3})])
def test_whole_runs_equal_a_program_by_hand(scores, ratio, without):
    for size in LATTE.sizes:
        pipe = LATTE.pipe(layers=4)
        calls = ran(pipe)
        with f3_pruning.apply(pipe, Config(scores=scores, ratio=ratio)):
            ours = LATTE.run(pipe, steps=5, size=size)
        assert calls == [[n for n in range(4) if n not in without]] * 5
        assert torch.equal(ours, LATTE.run(by_hand(LATTE.pipe(layers=4), without), steps=5, size=size))


def scores_by_hand(pipe, steps, calls=None, **setting):
    """Mean scores of each temporal attention, from its own projections."""
    blocks, found = pipe.transformer.temporal_transformer_blocks, {}

    def look(n, attn, args):
        if calls is not None and len(found.get(n, ())) >= calls:
            return
        q, k = (layer(args[0]).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k))
        weights = (q @ k.mT * attn.scale).softmax(-1)
        others = ~torch.eye(weights.shape[-1], dtype=torch.bool)
        found.setdefault(n, []).append(float(weights[..., others].sum() / weights[..., 0].numel()))
    handles = [block.attn1.register_forward_pre_hook(lambda attn, args, n=n: look(n, attn, args))
               for n, block in enumerate(blocks)]
    LATTE.run(pipe, steps=steps, **setting)
    for handle in handles:
        handle.remove()
    return [sum(found[n]) / len(found[n]) for n in range(len(blocks))]


def test_calibration_is_the_mean_over_the_run(tmp_path):
    pipe = LATTE.pipe(layers=3)
    expected = scores_by_hand(pipe, 4, batch=2)
    found = f3_pruning.calibrate(pipe, lambda: LATTE.run(pipe, steps=4, batch=2), save=tmp_path / "scores.json")
    assert found == pytest.approx(expected, rel=1e-4) and len(set(found)) == 3 and all(0 < each < 1 for each in found)
    assert Config(scores=tmp_path / "scores.json").scores == tuple(json.loads((tmp_path / "scores.json").read_text()))
    assert torch.equal(LATTE.run(pipe, steps=4), LATTE.run(LATTE.pipe(layers=3), steps=4))      # nothing stays behind


def test_without_scores_the_first_step_decides():
    pipe = LATTE.pipe(layers=4)
    expected = f3_pruning.pruned(scores_by_hand(pipe, 4, calls=1), 0.5)
    calls = ran(pipe)
    with f3_pruning.apply(pipe, Config()) as patch:
        LATTE.run(pipe, steps=4)
        assert patch.report()["saved"] == pytest.approx(6 / 16)
    left = [n for n in range(4) if n not in expected]
    assert calls == [[0, 1, 2, 3], left, left, left]


def test_guidance_in_two_calls_gives_the_same():
    outs = []
    for twice in (False, True):
        pipe = LATTE.pipe(layers=4)
        pipe.transformer.double()
        with f3_pruning.apply(pipe, Config()):
            if twice:
                in_two_calls(pipe)
            outs.append(LATTE.run(pipe, steps=5))
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-6)


def test_a_module_that_adds_nothing_is_not_missed():
    def pipe():
        made = LATTE.pipe(layers=2)
        for part in made.transformer.temporal_transformer_blocks[1].attn1.to_out[0].parameters():
            part.zero_()
        return made
    patched = pipe()
    with f3_pruning.apply(patched, Config(scores=(1, 0))):
        assert torch.equal(LATTE.run(patched), LATTE.run(pipe()))


def test_without_any_of_them_frames_know_nothing_of_each_other():
    pipe = LATTE.pipe(layers=2)
    x, text = torch.randn(1, 4, 4, 16, 16), torch.randn(1, 5, 16)
    other = x.clone()
    other[:, :, 0] += 1

    def change():
        """Of the frames behind the first, when the first changes."""
        new, old = (pipe.transformer(frames, torch.tensor([10]), text).sample[:, :, 1:] for frames in (other, x))
        return (new - old).abs().max()

    with f3_pruning.apply(pipe.transformer, Config(scores=(0, 0), ratio=1.0)):
        assert change() < 1e-5
    assert change() > 1e-2


def test_what_is_saved_is_what_the_modules_cost():
    """F frames of C channels cost 4 F C^2 + 2 F^2 C at each place, of which there are 64, for both halves of guidance."""
    pipe = LATTE.pipe(layers=4)
    plain = count_macs(lambda: LATTE.run(pipe, steps=3))
    with f3_pruning.apply(pipe, Config(scores=(0, 1, 2, 3), ratio=0.75)):
        found = count_macs(lambda: LATTE.run(pipe, steps=3))
    assert plain - found == 3 * 3 * 2 * 64 * (4 * 4 * 32 ** 2 + 2 * 4 ** 2 * 32)


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="ratio=1.5"):
        Config(ratio=1.5)
    with pytest.raises(ValueError, match="no whole temporal attention in a share of 0.2 of its 2"):
        f3_pruning.apply(LATTE.pipe(), Config(ratio=0.2))
    with pytest.raises(ValueError, match="3 scores for the 2 temporal attentions"):
        f3_pruning.apply(LATTE.pipe(), Config(scores=(1, 2, 3)))
    for name in ("cogvideox", "unet"):
        with pytest.raises(ValueError, match="no temporal attention"):
            f3_pruning.apply(FAMILIES[name].pipe())
    with pytest.raises(ValueError, match="made no call"):
        f3_pruning.calibrate(LATTE.pipe(), lambda: None)
