import pytest
import torch

from accel_kernels.merge import merge, mlerp, segments, unmerge

IMPLS = ("reference", "triton")


def random_source(batch, tokens, length, seed=0):
    return torch.randint(length, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def dense(x, source, length):
    """The segment mean as a matrix product, in float64."""
    membership = torch.nn.functional.one_hot(source, length).transpose(1, 2).double()
    return membership @ x.double() / membership.sum(-1, keepdim=True).clamp_min(1)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [10.0, 20.0]]])
    parts = segments(torch.tensor([[1, 0, 1, 3]]), 4)
    merged = merge(x, parts, impl=impl)
    assert merged.tolist() == [[[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [10.0, 20.0]]]
    expected = [[[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [10.0, 20.0]]]
    assert unmerge(merged, parts, impl=impl).tolist() == expected


def test_segments_are_sorted_by_row_then_position():
    parts = segments(torch.tensor([[2, 0, 2], [1, 1, 0]]), 3)
    assert parts.order.tolist() == [1, 0, 2, 5, 3, 4]
    assert parts.starts.tolist() == [0, 1, 1, 3, 4, 6]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)))
@pytest.mark.parametrize("batch, tokens, length, channels", ((2, 63, 20, 33), (1, 130, 1, 64), (2, 40, 90, 5)))
def test_agrees_with_the_matrix_product(impl, dtype, tolerance, batch, tokens, length, channels):
    torch.manual_seed(0)
    x, source = torch.randn(batch, tokens, channels).to(dtype), random_source(batch, tokens, length)
    parts = segments(source, length)
    merged = merge(x, parts, impl=impl)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), dense(x, source, length), rtol=tolerance, atol=tolerance)
    restored = unmerge(merged, parts, impl=impl)
    assert torch.equal(restored, torch.stack([merged[b, source[b]] for b in range(batch)]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_a_segment_of_one_is_copied_and_merging_again_changes_nothing(impl, dtype):
    x = torch.randn(2, 17, 6).to(dtype)
    parts = segments(torch.stack([torch.randperm(17) for _ in range(2)]), 17)
    assert torch.equal(unmerge(merge(x, parts, impl=impl), parts, impl=impl), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_low_precision_is_summed_in_fp32(impl):
    x = torch.full((1, 3000, 1), 60.0, dtype=torch.float16)  # the sum, 180,000, is past fp16's largest number
    assert merge(x, segments(torch.zeros(1, 3000, dtype=torch.int64), 1), impl=impl).item() == 60.0


@pytest.mark.parametrize("impl", IMPLS)
def test_mlerp_by_hand(impl):
    x = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [5.0, 5.0], [1.0, 0.0], [-1.0, 0.0]]])
    rows = mlerp(x, segments(torch.tensor([[1, 1, 0, 2, 2]]), 4), impl=impl)      # the mean of row 1 is (1.5, 2)
    torch.testing.assert_close(rows, torch.tensor([[[5.0, 5.0], [2.4, 3.2], [0.0, 0.0], [0.0, 0.0]]]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)))
@pytest.mark.parametrize("batch, tokens, length, channels", ((2, 63, 20, 33), (1, 130, 1, 64), (2, 40, 90, 5)))
def test_mlerp_keeps_the_largest_norm(impl, dtype, tolerance, batch, tokens, length, channels):
    torch.manual_seed(0)
    x, source = torch.randn(batch, tokens, channels).to(dtype), random_source(batch, tokens, length)
    rows = mlerp(x, segments(source, length), impl=impl)
    mean, norm = dense(x, source, length), x.double().norm(dim=-1)
    assert rows.dtype == dtype
    for b in range(batch):
        for row in range(length):
            members = norm[b][source[b] == row]
            expected = torch.nn.functional.normalize(mean[b, row], dim=0) * members.max() if len(members) else mean[b, row]
            torch.testing.assert_close(rows[b, row].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_mlerp_copies_a_segment_of_one(impl, dtype):
    x = torch.randn(2, 17, 6).to(dtype)
    parts = segments(torch.stack([torch.randperm(17) for _ in range(2)]), 17)
    assert torch.equal(unmerge(mlerp(x, parts, impl=impl), parts, impl=impl), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_mlerp_in_half_precision_sums_squares_in_fp32(impl):
    x = torch.full((1, 4, 512), 200.0, dtype=torch.float16)
    assert torch.equal(mlerp(x, segments(torch.zeros(1, 4, dtype=torch.int64), 1), impl=impl), x[:, :1])


def test_mlerp_of_very_wide_tokens_takes_the_reference():
    x, parts = torch.ones(1, 2, 4097), segments(torch.zeros(1, 2, dtype=torch.int64), 1)
    assert torch.equal(mlerp(x, parts), x[:, :1])
    with pytest.raises(ValueError, match="tokens have 4097 channels; allowed: up to 4096"):
        mlerp(x, parts, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl):
    parts = segments(random_source(2, 30, 8), 8)
    x, y = torch.randn(30, 2, 6).transpose(0, 1), torch.randn(2, 6, 8).transpose(1, 2)
    assert torch.equal(mlerp(x, parts, impl=impl), mlerp(x.contiguous(), parts, impl=impl))
    assert torch.equal(merge(x, parts, impl=impl), merge(x.contiguous(), parts, impl=impl))
    assert torch.equal(unmerge(y, parts, impl=impl), unmerge(y.contiguous(), parts, impl=impl))


def test_gradients():
    parts = segments(random_source(2, 9, 5), 5)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge(x, parts), x)
    assert torch.autograd.gradcheck(lambda y: unmerge(y, parts), y)
    assert torch.autograd.gradgradcheck(lambda x: merge(x, parts).square(), x)


def test_triton_gradients_are_those_of_the_reference():
    parts = segments(random_source(2, 33, 7), 7)
    x = torch.randn(2, 33, 5)
    gradients = []
    for impl in IMPLS:
        leaf = x.clone().requires_grad_()
        unmerge(merge(leaf, parts, impl=impl).square(), parts, impl=impl).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_bad_arguments_are_named():
    parts = segments(torch.zeros(1, 4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 8\), allowed: \(1, 4, 'any'\)"):
        merge(torch.zeros(1, 3, 8), parts)
    with pytest.raises(ValueError, match=r"y has shape \(1, 4, 8\), allowed: \(1, 2, 'any'\)"):
        unmerge(torch.zeros(1, 4, 8), parts)
    with pytest.raises(ValueError, match="length is 0, allowed: at least 1"):
        segments(torch.zeros(1, 4, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="source has dtype torch.float32"):
        segments(torch.zeros(1, 4), 2)


def test_compiles_into_one_graph_with_its_gradient(compiled):
    def round_trip(x, source):
        parts = segments(source, 8)
        return unmerge(merge(x, parts).square(), parts)

    source, x = random_source(2, 30, 8), torch.randn(2, 30, 6, requires_grad=True)
    expected = round_trip(x, source)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    result = compiled(round_trip)(x, source)
    assert torch.equal(result, expected)
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], gradient)


def test_mlerp_compiles_into_one_graph(compiled):
    x, source = torch.randn(2, 30, 6), random_source(2, 30, 8)

    def norms(x, source):
        return mlerp(x, segments(source, 8))

    assert torch.equal(compiled(norms)(x, source), norms(x, source))


def test_no_flops_are_counted(flops):
    parts = segments(random_source(2, 30, 8), 8)
    assert flops(mlerp, torch.randn(2, 30, 6), parts) == 0
    assert flops(merge, torch.randn(2, 30, 6), parts) == flops(unmerge, torch.randn(2, 8, 6), parts) == 0
