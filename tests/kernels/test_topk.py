import pytest
import torch

from accel_kernels.topk import topk_partition

IMPLS = ("reference", "triton")


def by_sorting(score, k):
    order = score.float().argsort(dim=1, descending=True, stable=True)
    return order[:, :k].sort(1).values, order[:, k:].sort(1).values


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    score = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.5], [-1.0, -3.0, -2.0, -4.0, 0.0]])
    chosen, rest = topk_partition(score, 3, impl=impl)
    assert chosen.tolist() == [[1, 2, 3], [0, 2, 4]]  # of the two 0.5 the left one
    assert rest.tolist() == [[0, 4], [1, 3]]


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("tokens", (1, 63, 130))
def test_agrees_with_a_stable_sort(impl, dtype, tokens):
    torch.manual_seed(0)
    score = torch.randn(3, tokens).mul(4).round().div(4).to(dtype)  # many ties, both signs, both zeros
    for k in {0, 1, tokens // 2, tokens - 1, tokens}:
        for result, expected in zip(topk_partition(score, k, impl=impl), by_sorting(score, k), strict=True):
            assert torch.equal(result, expected)


def test_more_than_one_tile_of_the_kernel():
    score = torch.randint(5, (2, 5000)).float()
    for result, expected in zip(topk_partition(score, 2100, impl="triton"), by_sorting(score, 2100), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_special_values(impl):
    nan, inf = float("nan"), float("inf")
    score = torch.tensor([[nan, -inf, inf, -0.0, 0.0, nan, 1e-45]])
    assert topk_partition(score, 1, impl=impl)[0].tolist() == [[2]]
    assert topk_partition(score, 3, impl=impl)[0].tolist() == [[2, 3, 6]]
    assert topk_partition(score, 5, impl=impl)[0].tolist() == [[0, 2, 3, 4, 6]]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl):
    score = torch.randn(50, 3).T
    for result, expected in zip(topk_partition(score, 20, impl=impl), by_sorting(score, 20), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "score, k, message",
    (
        (torch.zeros(4), 1, r"score has shape \(4,\), allowed: \(B, N\)"),
        (torch.zeros(1, 4, dtype=torch.int32), 1, "score has dtype torch.int32"),
        (torch.zeros(1, 4), 5, "k is 5, allowed: 0 to 4"),
        (torch.zeros(1, 4), -1, "k is -1, allowed: 0 to 4"),
    ),
)
def test_bad_arguments_are_named(score, k, message):
    with pytest.raises(ValueError, match=message):
        topk_partition(score, k)


def test_compiles_into_one_graph(compiled):
    score = torch.randn(2, 40)
    for result, expected in zip(compiled(topk_partition)(score, 15), topk_partition(score, 15), strict=True):
        assert torch.equal(result, expected)


def test_no_flops_are_counted(flops):
    assert flops(topk_partition, torch.randn(2, 40), 15) == 0
