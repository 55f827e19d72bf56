"""The nearest code, what passes through it to the vector, and what teaches the codes."""
import pytest
import torch
import torch.nn.functional as F

from methods._core.codebook import lookup, quantise


def pair(codes=11, depth=5, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(3, 7, depth, dtype=dtype, generator=random, requires_grad=True)
    return z, torch.randn(codes, depth, dtype=dtype, generator=random, requires_grad=True)


@pytest.mark.parametrize("unit", [False, True])
def test_the_nearest_is_that_of_a_slow_loop(unit):
    z, codes = pair()
    found = quantise(z, codes, unit)
    for b in range(3):
        for n in range(7):
            v, table = (F.normalize(part, dim=-1) if unit else part for part in (z[b, n], codes))
            distances = [float((v.detach() - row).square().sum()) for row in table.detach()]
            assert int(found.index[b, n]) == distances.index(min(distances))
    assert torch.equal(found.z_q, lookup(found.index, codes, unit))


def test_on_the_sphere_the_nearest_has_the_largest_cosine():
    z, codes = pair()
    found = quantise(3 * z, 0.1 * codes, unit=True)
    cosine = F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T
    assert torch.equal(found.index, cosine.argmax(-1)) and torch.equal(found.index, quantise(z, codes, unit=True).index)
    torch.testing.assert_close(found.z_q.norm(dim=-1), torch.ones(3, 7, dtype=torch.float64))
    distance = (F.normalize(z, dim=-1) - found.z_q).square().sum(-1)
    torch.testing.assert_close(distance, 2 - 2 * cosine.amax(-1))


def test_the_gradient_passes_straight_through():
    z, codes = pair()
    weight = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    (quantise(z, codes).z_q * weight).sum().backward()
    assert torch.equal(z.grad, weight) and codes.grad is None


def test_on_the_sphere_it_passes_to_the_normalised_vector():
    z, codes = pair()
    weight = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    (quantise(z, codes, unit=True).z_q * weight).sum().backward()
    again = z.detach().clone().requires_grad_()
    (F.normalize(again, dim=-1) * weight).sum().backward()
    torch.testing.assert_close(z.grad, again.grad)


def test_each_loss_teaches_its_own_side():
    z, codes = pair()
    found = quantise(z, codes)
    torch.testing.assert_close(found.codebook_loss, (z - codes[found.index]).square().mean())
    assert torch.equal(found.codebook_loss, found.commitment_loss)
    found.codebook_loss.backward(retain_graph=True)
    assert z.grad is None or not z.grad.any()
    assert set(codes.grad.any(-1).nonzero().flatten().tolist()) == set(found.index.unique().tolist())
    codes.grad = None
    found.commitment_loss.backward()
    assert z.grad.any() and (codes.grad is None or not codes.grad.any())


@pytest.mark.parametrize("unit", [False, True])
def test_a_vector_that_is_a_code_costs_nothing(unit):
    _, codes = pair()
    z = lookup(torch.tensor([[4, 0, 10]]), codes, unit).detach().requires_grad_()
    found = quantise(z, codes, unit)
    assert found.index.tolist() == [[4, 0, 10]]
    assert found.codebook_loss.item() < 1e-30 and found.commitment_loss.item() < 1e-30


def test_of_equal_codes_the_first_is_taken():
    assert quantise(torch.zeros(2, 3), torch.ones(4, 3)).index.tolist() == [0, 0]


@pytest.mark.parametrize("unit", [False, True])
def test_half_precision_is_quantised_in_single(unit):
    z, codes = (part.detach().to(torch.bfloat16) for part in pair())
    found, single = quantise(z, codes, unit), quantise(z.float(), codes.float(), unit)
    assert found.z_q.dtype == torch.bfloat16 and found.codebook_loss.dtype == torch.float32
    assert torch.equal(found.index, single.index) and torch.equal(found.codebook_loss, single.codebook_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantise(z.float(), codes.float(), unit).codebook_loss, single.codebook_loss)
