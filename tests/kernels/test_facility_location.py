import pytest
import torch

from accel_kernels.facility_location import facility_location

IMPLS = ("reference", "triton")


def by_definition(x, k):
    """f evaluated anew for every candidate set, one region and one candidate at a time."""
    picks = []
    for region in torch.nn.functional.normalize(x.double(), dim=-1):
        similar, chosen = region @ region.T, []
        for _ in range(k):
            before = similar[chosen].max(0).values if chosen else torch.zeros(len(region), dtype=torch.float64)
            values = [similar[[*chosen, v]].max(0).values.sum() - before.sum() for v in range(len(region))]
            values = [value if v not in chosen else torch.tensor(-1.0).double() for v, value in enumerate(values)]
            chosen.append(int(torch.stack(values).round(decimals=6).argmax()))
        picks.append(chosen)
    return torch.tensor(picks)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl):
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1]], [[0.0, 3], [2, 0], [5, 0]]])  # row sums 2, 2, 1 and 1, 2, 2
    assert facility_location(x, 2, impl=impl).tolist() == [[0, 2], [1, 0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("tokens, k, channels", ((16, 8, 20), (9, 9, 33), (1, 1, 4), (100, 7, 65)))
def test_agrees_with_the_definition(impl, dtype, tokens, k, channels):
    x = torch.randn(3, tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(facility_location(x, k, impl=impl), by_definition(x, k))


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_take_the_lower_position_once(impl):
    x = torch.ones(2, 16, 4)  # all alike: after the first pick nothing gains
    x[1, 8:] *= -1
    picks = facility_location(x, 3, impl=impl)
    assert picks.tolist() == [[0, 1, 2], [0, 8, 1]]


@pytest.mark.parametrize("impl", IMPLS)
def test_near_copies_are_not_picked_twice(impl):
    x = 1 + 1e-4 * torch.randn(2, 16, 20, generator=torch.Generator().manual_seed(0))
    picks = facility_location(x, 16, impl=impl)
    assert torch.equal(picks.sort().values, torch.arange(16).expand(2, -1))


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_vectors_and_the_scale_of_a_vector_count_for_nothing(impl):
    x = torch.zeros(1, 4, 3)
    x[0, 2], x[0, 3] = torch.tensor([0.0, 1e-3, 0]), torch.tensor([0.0, 0, 50])
    assert facility_location(x, 3, impl=impl).tolist() == [[2, 3, 0]]


def test_gains_do_not_grow():
    x = torch.randn(5, 40, 12, generator=torch.Generator().manual_seed(1))
    picks = facility_location(x, 40)
    unit = torch.nn.functional.normalize(x, dim=-1)
    similar = unit @ unit.mT
    value = similar.gather(1, picks[..., None].expand(-1, -1, 40)).cummax(1).values.sum(-1)  # f of each prefix
    gains = value.diff(dim=1)
    assert (gains > -1e-4).all() and (gains.diff(dim=1) < 1e-4).all()
    torch.testing.assert_close(value[:, -1], torch.full((5,), 40.0))


def test_reference_region_by_region(monkeypatch):
    x = torch.randn(5, 30, 8)
    expected = facility_location(x, 10)
    monkeypatch.setattr("accel_kernels.facility_location.TILE", 1)
    assert torch.equal(facility_location(x, 10), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input_and_no_regions(impl):
    x = torch.randn(9, 4, 6).transpose(0, 1)
    assert torch.equal(facility_location(x, 4, impl=impl), facility_location(x.contiguous(), 4))
    assert facility_location(x[:0], 4, impl=impl).shape == (0, 4)


def test_large_regions_are_the_reference_s():
    x = torch.randn(1, 150, 8)
    assert torch.equal(facility_location(x, 5), by_definition(x, 5))
    with pytest.raises(ValueError, match="regions have 150 tokens; allowed: up to 128"):
        facility_location(x, 5, impl="triton")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\), allowed: \(G, n, C\)"):
        facility_location(torch.zeros(4, 3), 1)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}, allowed: 1 to 4"):
            facility_location(torch.zeros(1, 4, 3), k)


def test_compiles_into_one_graph(compiled):
    x = torch.randn(3, 16, 8)
    assert torch.equal(compiled(lambda x: facility_location(x, 5))(x), facility_location(x, 5))


def test_flops_are_those_of_the_product_and_the_passes(flops):
    assert flops(facility_location, torch.randn(3, 16, 8), 5) == 2 * 3 * 16 * 16 * (8 + 5)
