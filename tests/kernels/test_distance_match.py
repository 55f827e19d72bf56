import pytest
import torch

from accel_kernels.distance_match import distance_match

IMPLS = ("reference", "triton")


def by_subtraction(x, src, dst):
    source, target = x[:, src].double(), x[:, dst].double()
    return (source[:, :, None] - target[:, None]).square().sum(-1).min(-1)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    """Distance and cosine rank two sources apart: (2, 0) is parallel to (1, 0), (0.8, 0.6) is nearer."""
    x = torch.tensor([[[1.0, 0], [2, 0], [0.8, 0.6], [0, 9]]])
    distance, index = distance_match(x, torch.tensor([1, 2]), torch.tensor([0, 3]), impl=impl)
    torch.testing.assert_close(distance, torch.tensor([[1.0, 0.4]]))
    assert index.tolist() == [[0, 0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("tokens, targets, channels", ((64, 8, 20), (150, 70, 33), (2, 1, 4)))
def test_agrees_with_subtraction(impl, dtype, tokens, targets, channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, tokens, channels, generator=generator).to(dtype)
    order = torch.randperm(tokens, generator=generator)
    dst, src = order[:targets], order[targets:]
    distance, index = distance_match(x, src, dst, impl=impl)
    expected = by_subtraction(x, src, dst)
    torch.testing.assert_close(distance.double(), expected.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(index, expected.indices)


@pytest.mark.parametrize("impl", IMPLS)
def test_duplicates_are_at_distance_zero_and_ties_take_the_lower_column(impl):
    x = 30 * torch.ones(1, 100, 7)
    src, dst = torch.arange(30), torch.arange(30, 100)
    distance, index = distance_match(x, src, dst, impl=impl)
    assert distance.count_nonzero() == 0 and index.count_nonzero() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_of_each_sample_and_no_sources(impl):
    x = torch.randn(2, 40, 6)
    order = torch.stack([torch.randperm(40) for _ in range(2)])
    distance, index = distance_match(x, order[:, 10:], order[:, :10], impl=impl)
    for b in range(2):
        alone = distance_match(x[b : b + 1], order[b, 10:], order[b, :10], impl=impl)
        assert torch.equal(index[b], alone[1][0])
        torch.testing.assert_close(distance[b], alone[0][0])
    assert distance_match(x, order[:, :0], order[:, :10], impl=impl)[0].shape == (2, 0)


def test_reference_over_several_tiles(monkeypatch):
    x, src, dst = torch.randn(3, 90, 8), torch.arange(60), torch.arange(60, 90)
    expected = distance_match(x, src, dst)
    monkeypatch.setattr("accel_kernels._shapes.TILE", 600)
    result = distance_match(x, src, dst)
    assert torch.equal(result[1], expected[1])
    torch.testing.assert_close(result[0], expected[0])


def test_bad_arguments_are_named():
    x, some = torch.zeros(2, 5, 3), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x has shape \(5, 3\), allowed: \(B, N, C\)"):
        distance_match(x[0], some, some)
    with pytest.raises(ValueError, match="src has dtype torch.int32"):
        distance_match(x, some.int(), some)
    with pytest.raises(ValueError, match="at least one destination"):
        distance_match(x, some, some[:, :0])


def test_compiles_into_one_graph(compiled):
    x, src, dst = torch.randn(2, 30, 8), torch.arange(20), torch.arange(20, 30)
    for result, expected in zip(compiled(distance_match)(x, src, dst), distance_match(x, src, dst), strict=True):
        assert torch.equal(result, expected)


def test_flops_are_those_of_the_product(flops):
    assert flops(distance_match, torch.randn(2, 30, 8), torch.arange(20), torch.arange(20, 30)) == 2 * 2 * 20 * 10 * 8
