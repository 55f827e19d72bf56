import pytest
import torch

from accel_kernels.attention_graph import flow, log_sums, partner

IMPLS = ("reference", "triton")


def dense(q, k, scale=None):
    """The map (B, H, N, M)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q.double() @ k.double().mT * scale).softmax(-1)


def inputs(batch, heads, queries, keys, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, n, width) for n in (queries, keys))
    q, k = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, torch.rand(batch, heads, queries, generator=generator)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    q, k = torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[0.0], [3.0]]]]).log1p()  # rows (1/2, 1/2) and (1/5, 4/5)
    lse = log_sums(q, k, scale=1.0, impl=impl)
    torch.testing.assert_close(lse.exp().flatten(), torch.tensor([2.0, 5.0]))
    s = torch.tensor([[[0.5, 0.25]]])
    torch.testing.assert_close(flow(q, k, lse, s, scale=1.0, impl=impl).flatten(), torch.tensor([0.3, 0.45]))
    assert partner(q, k, lse, scale=1.0, impl=impl).tolist() == [[0, 1]]  # the first row is a tie


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("queries, keys, width", ((63, 130, 20), (130, 63, 72), (1, 1, 8)))
def test_agrees_with_the_whole_map(impl, dtype, queries, keys, width):
    q, k, s = inputs(2, 3, queries, keys, width, dtype)
    a, lse = dense(q, k), log_sums(q, k, impl=impl)
    torch.testing.assert_close(lse.double(), (q.double() @ k.double().mT * width**-0.5).logsumexp(-1), rtol=1e-4, atol=1e-4)
    expected = (s.double()[:, :, None] @ a)[:, :, 0]
    torch.testing.assert_close(flow(q, k, lse, s, impl=impl).double(), expected, rtol=1e-4, atol=1e-4)
    mean = a.mean(1)
    best = partner(q, k, lse, impl=impl)
    torch.testing.assert_close(mean.gather(2, best[..., None])[..., 0], mean.amax(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_is_conserved_and_a_uniform_map_makes_it_uniform(impl):
    q, k, s = inputs(2, 2, 40, 40, 8)
    s = s / s.sum(-1, keepdim=True)
    moved = flow(q, k, log_sums(q, k, impl=impl), s, impl=impl)
    torch.testing.assert_close(moved.sum(-1), torch.ones(2, 2))
    assert (moved > 0).all()
    lse = log_sums(0 * q, k, impl=impl)
    torch.testing.assert_close(flow(0 * q, k, lse, s, impl=impl), torch.full((2, 2, 40), 1 / 40))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_and_columns_may_be_left_out(impl):
    q, k, _ = inputs(1, 2, 50, 50, 8)
    lse = log_sums(q, k)
    rows, columns = torch.arange(0, 50, 3), torch.arange(1, 50, 4)
    best = partner(q[:, :, rows], k[:, :, columns], lse[:, :, rows], impl=impl)
    assert torch.equal(best, dense(q, k).mean(1)[:, rows][:, :, columns].argmax(-1))


def test_reference_over_several_tiles(monkeypatch):
    q, k, s = inputs(2, 3, 90, 60, 16)
    lse = log_sums(q, k)
    expected = lse, flow(q, k, lse, s), partner(q, k, lse)
    monkeypatch.setattr("accel_kernels.attention_graph.TILE", 3000)
    for result, whole in zip((log_sums(q, k), flow(q, k, lse, s), partner(q, k, lse)), expected, strict=True):
        torch.testing.assert_close(result, whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl):
    q, k, s = inputs(1, 2, 20, 30, 8)
    lse = log_sums(100 * q, 100 * k, impl=impl)
    assert lse.isfinite().all()
    expected = (s.double()[:, :, None] @ dense(100 * q, 100 * k))[:, :, 0]
    torch.testing.assert_close(flow(100 * q, 100 * k, lse, s, impl=impl).double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input_and_no_queries(impl):
    q, k, s = inputs(2, 3, 20, 30, 8)
    strided = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    lse = log_sums(q, k, impl=impl)
    assert torch.equal(log_sums(*strided, impl=impl), lse)
    assert torch.equal(flow(*strided, lse, s, impl=impl), flow(q, k, lse, s, impl=impl))
    assert torch.equal(partner(*strided, lse, impl=impl), partner(q, k, lse, impl=impl))
    none = q[:, :, :0]
    assert log_sums(none, k, impl=impl).shape == (2, 3, 0)
    assert flow(none, k, lse[:, :, :0], s[:, :, :0], impl=impl).count_nonzero() == 0
    assert partner(none, k, lse[:, :, :0], impl=impl).shape == (2, 0)


def test_bad_arguments_are_named():
    q, k, s = inputs(1, 1, 4, 5, 8)
    with pytest.raises(ValueError, match=r"q has shape \(1, 4, 8\), allowed: \(B, H, tokens, D\)"):
        log_sums(q[0], k)
    with pytest.raises(ValueError, match=r"k has shape \(1, 1, 5, 4\) .* allowed: \(1, 1, 'M >= 1', 8\)"):
        log_sums(q, k[..., :4])
    with pytest.raises(ValueError, match=r"s has shape \(1, 1, 3\) .* allowed: \(1, 1, 4\) of torch.float32"):
        flow(q, k, s, s[..., :3])
    with pytest.raises(ValueError, match=r"lse has .* of torch.float64, allowed"):
        partner(q, k, s.double())


def test_compiles_into_one_graph(compiled):
    def read(q, k, s):
        lse = log_sums(q, k)
        return flow(q, k, lse, s), partner(q, k, lse)

    q, k, s = inputs(1, 2, 20, 30, 8)
    for result, expected in zip(compiled(read)(q, k, s), read(q, k, s), strict=True):
        assert torch.equal(result, expected)


def test_flops_are_those_of_one_product_each(flops):
    q, k, s = inputs(2, 3, 20, 30, 8)
    for op, *arguments in ((log_sums, q, k), (flow, q, k, s, s), (partner, q, k, s)):
        assert flops(op, *arguments) == 2 * 2 * 3 * 20 * 30 * 8
