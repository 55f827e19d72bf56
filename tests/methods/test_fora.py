import authors_dit
import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from methods import fora


@pytest.mark.parametrize("check, case", contract.cases(fora, fora.Config(interval=3)), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("steps, interval, count", [(250, 3, 84), (50, 3, 18), (20, 2, 11), (250, 5, 51), (7, 1, 7)])
def test_number_of_compute_steps(steps, interval, count):
    assert sum(fora.computes(i, steps, interval) for i in range(steps)) == count


def test_compute_steps_count_down():
    down = [49 - i for i in range(50) if fora.computes(i, 50, 3)]
    assert down[:4] == [49, 48, 45, 42] and down[-1] == 0
    assert [i for i in range(10) if fora.computes(i, 10, 3, "start")] == [0, 3, 6, 9]


def counted(modules):
    """How often the forward of each module really runs, below whatever patches it carries."""
    calls = {module: 0 for module in modules}
    for module in modules:
        module.register_forward_hook(lambda m, *_: calls.update({m: calls[m] + 1}))
    return calls


def test_reuse_steps_run_no_linear_of_attention_or_mlp_and_every_modulation():
    pipe = FAMILIES["dit"].pipe()
    blocks = pipe.transformer.transformer_blocks
    inner = counted([layer for b in blocks for layer in (b.attn1.to_q, b.attn1.to_out[0], b.ff.net[0].proj, b.ff.net[2])])
    gates = counted([b.norm1.linear for b in blocks])
    with fora.apply(pipe, fora.Config(interval=3)) as patch:
        FAMILIES["dit"].run(pipe, steps=8)
        report = patch.report()
    full = sum(fora.computes(i, 8, 3) for i in range(8))
    assert set(inner.values()) == {full} and set(gates.values()) == {8}
    assert report["computed"] == full * 2 * len(blocks) and report["reused"] == (8 - full) * 2 * len(blocks)


def test_a_reuse_step_adds_kept_outputs_times_todays_gates():
    """x_out - x_in = sum over blocks of gate(t) * kept output, exactly the linear form of the paper."""
    pipe = FAMILIES["dit"].pipe()
    blocks = pipe.transformer.transformer_blocks
    outputs, gates, streams = [[] for _ in blocks], [[] for _ in blocks], []
    with fora.apply(pipe, fora.Config(interval=4)):
        for i, block in enumerate(blocks):
            block.attn1.register_forward_hook(lambda m, a, out, i=i: outputs[i].append(out))
            block.ff.register_forward_hook(lambda m, a, out, i=i: outputs[i].append(out))
            block.norm1.register_forward_hook(lambda m, a, out, i=i: gates[i].append((out[1], out[4])))
        blocks[0].register_forward_pre_hook(lambda m, a: streams.append(a[0]))
        blocks[-1].register_forward_hook(lambda m, a, out: streams.append(out))
        FAMILIES["dit"].run(pipe, steps=4)                       # counting down: 3 and 0 compute, 2 and 1 reuse
    for step in (1, 2):
        expected = streams[2 * step]
        for kept, gate in zip(outputs, gates, strict=True):
            attn, ff = kept[0], kept[1]                          # of the compute step
            msa, mlp = gate[step]
            expected = expected + msa[:, None] * attn
            expected = expected + mlp[:, None] * ff
        torch.testing.assert_close(streams[2 * step + 1], expected, atol=1e-5, rtol=1e-5)


# prathebaselva/FORA@acde628eb1c9, its DiT with the weights of `authors_dit` and N = 3 over 6 steps, double precision
OFFICIAL = [[0.641399, 0.847842], [0.769226, 0.901548], [0.791058, 0.949085],
            [0.726051, 0.862406], [0.630462, 0.827081], [0.659613, 0.821292]]


def test_equals_the_official_code():
    pipe = authors_dit.pipeline(layers=2)
    with fora.apply(pipe, fora.Config(interval=3)):
        ours = authors_dit.answers(pipe, 6)
    torch.testing.assert_close(ours, torch.tensor(OFFICIAL, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_bare_model_is_refused():
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        fora.apply(FAMILIES["dit"].pipe().transformer)


@pytest.mark.parametrize("wrong, named", [({"interval": 0}, "interval=0"), ({"count_from": "middle"}, "count_from='middle'")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        fora.Config(**wrong)
