"""Quantisation of what is left over, scale by scale: by hand, as a sum that telescopes, with codes that go back."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods._core.residual import Quantiser, nucleus


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quantiser(scales=(1, 2, 3, 3), codes=7, depth=4, convolutions=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Quantiser(codes, depth, scales, convolutions, 0.25).double()


F_IN = torch.randn(5, 4, 3, 3, generator=generator(1), dtype=torch.float64)


def test_by_hand():
    """Two channels so that cosines tell: mean (2, 2) is (1, 1), (2, 0) more at one place; phi passes all."""
    made = Quantiser(2, 2, (1, 2), 1, 0.25).double()
    made.codes.data = torch.tensor([[2.0, 2.0], [4.0, 0.0]], dtype=torch.float64)
    nn.init.dirac_(made.phi[0].weight)
    made.phi[0].bias.data.zero_()
    f = torch.tensor([[[2.0, 2.0], [6.0, 2.0]], [[2.0, 2.0], [2.0, 2.0]]], dtype=torch.float64)[None]     # (1, 2, 2, 2)
    found = made(f)
    assert found.index[0].tolist() == [[0]]                              # the mean (3, 2) is nearer to (1, 1) than to (1, 0)
    assert int(found.index[1][0, 2]) == 1                                # (4, 0) is left
    z0, z1 = made.shown(found.index[0], 0), made.shown(found.index[1], 1)
    assert torch.equal(z0, torch.full_like(f, 2.0)) and z1[0, :, 1, 0].tolist() == [4, 0]
    torch.testing.assert_close(found.z, z0 + z1)
    first = (z0 - f).square().mean()
    torch.testing.assert_close(found.codebook_loss, (first + (z0 + z1 - f).square().mean()) / 2)
    torch.testing.assert_close(found.commitment_loss, 0.25 * (first + (z0 + z1 - f).square().mean()))


def test_what_is_left_over_and_what_is_said_make_the_whole():
    made = quantiser()
    found, rest = made(F_IN), F_IN
    for s, p in enumerate(made.scales):
        small = F.interpolate(rest, size=(p, p), mode="area").flatten(2).mT
        cosine = F.normalize(small, dim=-1) @ F.normalize(made.codes, dim=-1).T
        assert torch.equal(found.index[s], cosine.argmax(-1)) and found.index[s].shape == (5, p * p)
        rest = rest - made.shown(found.index[s], s)
    torch.testing.assert_close(rest + found.z, F_IN)
    torch.testing.assert_close(sum(made.shown(index, s) for s, index in enumerate(found.index)), found.z)


def test_scales_share_convolutions_by_the_nearest_tick():
    def shared(made):
        return [[*made.phi].index(made.convolution(s)) for s in range(len(made.scales))]
    assert shared(quantiser(scales=tuple(range(1, 11)))) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]     # ticks 1/12, 13/36, 23/36, 11/12
    assert shared(quantiser(convolutions=2)) == [0, 0, 1, 1]                                   # 1/4 and 3/4
    assert shared(quantiser(convolutions=1)) == [0, 0, 0, 0]


def test_gradients():
    """Straight through to what was quantised; codes and convolutions learn from the first loss, the map from the second."""
    made, f = quantiser(), F_IN.clone().requires_grad_()
    found, weight = made(f), torch.randn(F_IN.shape, generator=generator(2), dtype=torch.float64)
    (found.z * weight).sum().backward(retain_graph=True)
    assert torch.equal(f.grad, weight) and made.codes.grad is None
    f.grad = None
    found.codebook_loss.backward(retain_graph=True)
    assert f.grad is None and made.codes.grad.any() and made.phi[0].weight.grad.any()
    made.zero_grad(set_to_none=True)
    found.commitment_loss.backward()
    assert f.grad.any() and made.codes.grad is None


def test_scales_that_are_dropped_do_not_count_but_pass_on():
    made = quantiser()
    kept = torch.tensor([1, 4, 4, 2, 4])
    found, whole = made(F_IN, kept), made(F_IN)
    assert all(torch.equal(a, b) for a, b in zip(found.index, whole.index, strict=True))
    steps = [made.shown(index, s) for s, index in enumerate(whole.index)]
    torch.testing.assert_close(found.z[0], steps[0][0])
    torch.testing.assert_close(found.z[3], steps[0][3] + steps[1][3])
    torch.testing.assert_close(found.z[1], whole.z[1])
    total, z = 0, torch.zeros_like(F_IN)
    for s, step in enumerate(steps):
        on = s < kept
        z = z + step * on[:, None, None, None]
        total = total + (z - F_IN)[on].square().mean()                     # the mean over those that count
    torch.testing.assert_close(found.codebook_loss, total / 4)


@pytest.mark.parametrize("top_k, top_p, expected", [(4, 1.0, [0.4, 0.3, 0.2, 0.1]), (2, 1.0, [4 / 7, 3 / 7, 0, 0]),
                                                    (4, 0.6, [4 / 7, 3 / 7, 0, 0]), (4, 0.3, [1, 0, 0, 0]),
                                                    (3, 0.75, [4 / 7, 3 / 7, 0, 0]), (1, 0.01, [1, 0, 0, 0])])
def test_the_likeliest_codes(top_k, top_p, expected):
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    found = nucleus(p.log()[order], top_k, top_p)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64)[order])
