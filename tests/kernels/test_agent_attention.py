import pytest
import torch

from accel_kernels._triton.cosine_match import launch
from accel_kernels.agent_attention import agent_attention

IMPLS = ("reference", "triton")


def whole_map(q, k, v, a, scale, sharp, shortcut):
    """Both maps in full, in float64."""
    q, k, v, a = (t.double() for t in (q, k, v, a))
    weight = (sharp * q @ a.mT).softmax(-1) @ (scale * a @ k.mT).softmax(-1)
    torch.testing.assert_close(weight.sum(-1), torch.ones(q.shape[:3], dtype=torch.float64))
    assert (torch.linalg.matrix_rank(weight) <= a.shape[2]).all()
    return weight @ v + shortcut * v


def inputs(batch, heads, tokens, agents, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, heads, n, width, generator=generator).to(dtype) for n in (tokens, tokens, tokens, agents))


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    k = torch.tensor([0.0, 3.0]).log1p().view(1, 1, 2, 1)  # the agent of 1 weighs the keys 1 : 4, that of 0 alike
    v, q = torch.tensor([0.0, 10.0]).view(1, 1, 2, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    a = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)  # reads 5 and 8
    out = agent_attention(q, k, v, a, scale=1.0, sharp=2.0, shortcut=0.5, impl=impl).flatten()
    share = torch.tensor(2.0).sigmoid()
    torch.testing.assert_close(out, torch.stack([torch.tensor(6.5), 5 + 3 * share + 5]))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 5e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)))
@pytest.mark.parametrize("tokens, agents, width", ((63, 5, 20), (150, 40, 72), (1, 1, 8)))
def test_equals_the_whole_map(impl, dtype, tolerance, tokens, agents, width):
    q, k, v, a = inputs(2, 2, tokens, agents, width, dtype)
    out = agent_attention(q, k, v, a, scale=0.4, sharp=0.7, shortcut=0.075, impl=impl)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), whole_map(q, k, v, a, 0.4, 0.7, 0.075), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_values_come_out_scaled(impl):
    q, k, _, a = inputs(1, 2, 40, 6, 8)
    v = torch.full_like(q, 1.7)
    torch.testing.assert_close(agent_attention(q, k, v, a, scale=0.4, sharp=0.7, shortcut=0.075, impl=impl), 1.075 * v)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl):
    q, k, v, a = inputs(1, 1, 90, 4, 8)
    out = agent_attention(100 * q, 100 * k, v, 100 * a, scale=0.4, sharp=0.4, impl=impl)
    torch.testing.assert_close(out.double(), whole_map(100 * q, 100 * k, v, 100 * a, 0.4, 0.4, 0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl):
    tensors = inputs(2, 3, 20, 5, 8)
    strided = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)
    results = [agent_attention(*t, scale=0.4, sharp=0.7, shortcut=0.1, impl=impl) for t in (tensors, strided)]
    torch.testing.assert_close(*results)


def test_reference_in_double_precision():
    tensors = tuple(t.double() for t in inputs(1, 2, 20, 4, 8))
    out = agent_attention(*tensors, scale=0.4, sharp=0.7, shortcut=0.1)
    torch.testing.assert_close(out, whole_map(*tensors, 0.4, 0.7, 0.1))


@pytest.mark.parametrize("keys, tiles, block", ((4096, 32, 64), (100, 1, 64), (1, 500, 32), (65, 255, 64)))
def test_every_run_of_keys_has_one(keys, tiles, block):
    (_, runs, _), span = launch(tiles, 1, keys, {"BS": 1, "BD": block})
    assert span % block == 0 and (runs - 1) * span < keys <= runs * span
    assert runs == 1 or runs * tiles <= 2 * 256


@pytest.mark.parametrize(
    "change, message",
    (
        ({"a": torch.zeros(1, 2, 0, 8)}, r"a has shape \(1, 2, 0, 8\) of torch.float32, allowed: \(1, 2, 'n', 8\)"),
        ({"k": torch.zeros(1, 2, 5, 8)}, r"k has shape \(1, 2, 5, 8\) of torch.float32, allowed: \(1, 2, 6, 8\)"),
        ({"v": torch.zeros(1, 2, 6, 8).half()}, r"v has .* of torch.float16, allowed: .* of torch.float32"),
        ({"q": torch.zeros(2, 6, 8)}, r"q has shape \(2, 6, 8\), allowed: \(B, H, tokens, D\)"),
    ),
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(zip("qkva", inputs(1, 2, 6, 3, 8), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        agent_attention(**arguments, scale=1.0, sharp=1.0)


def test_compiles_into_one_graph(compiled):
    def through(q, k, v, a):
        return agent_attention(q, k, v, a, scale=0.4, sharp=0.7, shortcut=0.1)

    tensors = inputs(1, 2, 20, 4, 8)
    assert torch.equal(compiled(through)(*tensors), through(*tensors))


def test_flops_are_linear_in_the_tokens(flops):
    assert flops(agent_attention, *inputs(2, 3, 20, 4, 8), scale=1.0, sharp=1.0) == 8 * 2 * 3 * 4 * 20 * 8
