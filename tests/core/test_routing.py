import pytest
import torch
from torch import nn

from methods._core.routing import gate, through


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sharp_gates_are_open_where_the_logit_is_positive():
    assert gate(torch.tensor([-3.0, -1e-9, 0.0, 1e-9, 5.0]), 5.0).tolist() == [0, 0, 0, 1, 1]


def test_a_gate_is_hard_and_its_gradient_that_of_the_sigmoid():
    z = torch.randn(1000, dtype=torch.float64, generator=generator(1)).requires_grad_()
    u = torch.rand(1000, generator=generator())
    out = gate(z, 5.0, generator())
    assert set(out.detach().round(decimals=12).tolist()) == {0.0, 1.0}
    assert torch.equal(out > 0.5, z + torch.logit(u, eps=1e-7) > 0)
    out.sum().backward()
    s = ((z.detach() + torch.logit(u, eps=1e-7)) / 5).sigmoid()
    torch.testing.assert_close(z.grad, s * (1 - s) / 5)


def test_noise_is_that_of_two_gumbel_draws():
    """P(open) = P(z + G1 - G2 > 0) = sigmoid(z), whatever tau."""
    for z in (-1.0, 0.0, 2.0):
        for tau in (1.0, 5.0):
            share = gate(torch.full((40_000,), z), tau, generator(3)).mean()
            assert float(share) == pytest.approx(float(torch.tensor(z).sigmoid()), abs=0.01)


def test_half_precision_and_the_global_generator():
    before = torch.get_rng_state()
    out = gate(torch.full((8,), 15.0, dtype=torch.bfloat16), 5.0, generator())
    assert out.dtype == torch.float32 and out.tolist() == [1.0] * 8
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_passing_by_equals_a_mask(share):
    layer = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)).double()
    x = torch.randn(3, 20, 6, dtype=torch.float64, generator=generator())
    keep = torch.rand(3, 20, generator=generator(1)) < share
    seen = []
    layer.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:-1].numel()))
    out = through(layer, x, keep)
    assert sum(seen) == int(keep.sum())
    torch.testing.assert_close(out, layer(x) * keep[..., None])
    assert torch.equal(out[~keep], torch.zeros_like(x)[~keep])
