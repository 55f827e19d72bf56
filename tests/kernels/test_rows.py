import pytest
import torch

from accel_kernels.rows import gather_rows, scatter_rows

IMPLS = ("reference", "triton")


def distinct(batch, tokens, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator)[:k] for _ in range(batch)])


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    index = torch.tensor([[2, 0], [1, 0]])
    assert gather_rows(x, index, impl=impl).flatten().tolist() == [3.0, 1.0, 5.0, 4.0]
    rows = torch.tensor([[[-1.0], [-2.0]], [[-3.0], [-4.0]]])
    assert scatter_rows(x, index, rows, impl=impl).flatten().tolist() == [-2.0, 2.0, -1.0, -4.0, -3.0, 6.0]
    assert x.flatten().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("tokens, k, channels", ((63, 20, 33), (130, 130, 64), (7, 0, 4), (5, 1, 1030)))
def test_agrees_with_plain_indexing(impl, dtype, tokens, k, channels):
    x, index = torch.randn(2, tokens, channels).to(dtype), distinct(2, tokens, k)
    rows = gather_rows(x, index, impl=impl)
    assert torch.equal(rows, torch.stack([x[b, index[b]] for b in range(2)]))
    expected = x.clone()
    for b in range(2):
        expected[b, index[b]] = 2 * rows[b]
    assert torch.equal(scatter_rows(x, index, 2 * rows, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_can_be_gathered(impl):
    x = torch.randn(1, 4, 3)
    assert torch.equal(gather_rows(x, torch.tensor([[1, 1, 3, 1]]), impl=impl), x[:, [1, 1, 3, 1]])


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl):
    x, index, rows = torch.randn(9, 2, 6).transpose(0, 1), distinct(4, 9, 4)[::2], torch.randn(2, 6, 4).transpose(1, 2)
    assert torch.equal(gather_rows(x, index, impl=impl), gather_rows(x.contiguous(), index.contiguous()))
    result = scatter_rows(x, index, rows, impl=impl)
    assert torch.equal(result, scatter_rows(x.contiguous(), index.contiguous(), rows.contiguous()))


def test_gradients():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    index = distinct(2, 6, 4)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, torch.tensor([[1, 1, 5], [0, 2, 0]])), x)
    assert torch.autograd.gradcheck(lambda x, rows: scatter_rows(x, index, rows), (x, rows))
    assert torch.autograd.gradgradcheck(lambda x, rows: scatter_rows(x, index, rows).square(), (x, rows))


def test_triton_gradients_are_those_of_the_reference():
    index, base = distinct(2, 30, 11), torch.randn(2, 30, 5)
    gradients = []
    for impl in IMPLS:
        leaf = base.clone().requires_grad_()
        scatter_rows(leaf, index, gather_rows(leaf, index, impl=impl).square(), impl=impl).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_bad_arguments_are_named():
    x, index = torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"index has shape \(4,\), allowed: \(2, any\)"):
        gather_rows(x, index[0])
    with pytest.raises(ValueError, match="index has dtype torch.int32, allowed: torch.int64"):
        gather_rows(x, index.int())
    with pytest.raises(ValueError, match=r"rows has shape \(2, 3, 3\) .* allowed: \(2, 4, 3\) of torch.float32"):
        scatter_rows(x, index, torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match=r"of torch.float16, allowed: .* of torch.float32"):
        scatter_rows(x, index, torch.zeros(2, 4, 3, dtype=torch.float16))


def test_compiles_into_one_graph_with_its_gradient(compiled):
    def refresh(x, index):
        return scatter_rows(x, index, gather_rows(x, index).square())

    index, x = distinct(2, 30, 11), torch.randn(2, 30, 5, requires_grad=True)
    expected = refresh(x, index)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    result = compiled(refresh)(x, index)
    assert torch.equal(result, expected)
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], gradient)


def test_no_flops_are_counted(flops):
    x, index = torch.randn(2, 30, 5), distinct(2, 30, 11)
    assert flops(gather_rows, x, index) == flops(scatter_rows, x, index, x[:, :11]) == 0
