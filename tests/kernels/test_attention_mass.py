import pytest
import torch

from accel_kernels.attention_mass import attention_mass

IMPLS = ("reference", "triton")


def dense(q, k, v, scale):
    weight = (q.float() @ k.float().transpose(2, 3) * scale).softmax(-1)
    return weight @ v.float(), weight.sum(2).mean(1)


def inputs(batch, heads, queries, keys, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, n, width) for n in (queries, keys, keys))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    q = torch.tensor([[[[0.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [3.0]]]]).log1p()  # logits 0 and ln 4 for the second query
    v = torch.tensor([[[[0.0], [10.0]]]])
    out, mass = attention_mass(q, k, v, scale=1.0, impl=impl)
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 8.0]))
    torch.testing.assert_close(mass, torch.tensor([[0.7, 1.3]]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)))
@pytest.mark.parametrize("queries, keys, width", ((63, 130, 20), (130, 63, 72), (1, 1, 8)))
def test_agrees_with_the_whole_map(impl, dtype, tolerance, queries, keys, width):
    q, k, v = inputs(2, 2, queries, keys, width, dtype)
    out, mass = attention_mass(q, k, v, impl=impl)
    expected, expected_mass = dense(q, k, v, width**-0.5)
    assert out.dtype == dtype and mass.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mass, expected_mass, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mass.sum(1), torch.full((2,), float(queries)), rtol=1e-5, atol=0)


def test_reference_over_several_tiles(monkeypatch):
    monkeypatch.setattr("accel_kernels.attention_mass.TILE", 3000)
    for queries in (9, 90):  # several heads in a tile, then parts of one
        q, k, v = inputs(2, 3, queries, 60, 16)
        for result, expected in zip(attention_mass(q, k, v), dense(q, k, v, 0.25), strict=True):
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl):
    q, k, v = inputs(1, 1, 20, 30, 8)
    out, mass = attention_mass(100 * q, 100 * k, v, impl=impl)
    expected, expected_mass = dense(100 * q, 100 * k, v, 8**-0.5)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mass, expected_mass, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input_and_no_queries(impl):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(2, 3, 20, 30, 8))
    expected = attention_mass(q.contiguous(), k.contiguous(), v.contiguous(), impl=impl)
    for result, plain in zip(attention_mass(q, k, v, impl=impl), expected, strict=True):
        assert torch.equal(result, plain)
    out, mass = attention_mass(q[:, :, :0], k, v, impl=impl)
    assert out.shape == (2, 3, 0, 8) and mass.shape == (2, 30) and mass.count_nonzero() == 0


def test_autocast_keeps_the_fp32_result():
    q, k, v = inputs(1, 2, 20, 30, 8)
    expected = attention_mass(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention_mass(q, k, v)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda q, k, v: (q[0], k, v), r"q has shape \(1, 4, 8\), allowed: \(B, H, tokens, D\)"),
        (lambda q, k, v: (q, k[..., :4], v), r"k has shape \(1, 1, 5, 4\) .* allowed: \(1, 1, 'M >= 1', 8\)"),
        (lambda q, k, v: (q, k[:, :, :0], v), r"k has shape \(1, 1, 0, 8\)"),
        (lambda q, k, v: (q, k, v[:, :, :3]), r"v has shape \(1, 1, 3, 8\) .* allowed: \(1, 1, 5, 8\)"),
        (lambda q, k, v: (q, k.half(), v), r"k has .* of torch.float16, allowed: .* of torch.float32"),
    ),
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention_mass(*change(*inputs(1, 1, 4, 5, 8)))


def test_compiles_into_one_graph(compiled):
    q, k, v = inputs(1, 2, 20, 30, 8)
    for result, expected in zip(compiled(attention_mass)(q, k, v), attention_mass(q, k, v), strict=True):
        assert torch.equal(result, expected)


def test_flops_are_those_of_two_products(flops):
    assert flops(attention_mass, *inputs(2, 3, 20, 30, 8)) == 4 * 2 * 3 * 20 * 30 * 8
