import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from methods._core import width


@pytest.fixture
def attn():
    torch.manual_seed(0)
    return Attention(query_dim=12, heads=4, dim_head=3, bias=True).double().eval()


@pytest.fixture
def ff():
    torch.manual_seed(0)
    return FeedForward(12, activation_fn="gelu-approximate").double().eval()


X = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_a_narrow_layer_has_the_chosen_weights():
    linear = nn.Linear(5, 4)
    small = width.narrow(linear, rows=torch.tensor([2, 0]), columns=torch.tensor([1, 4, 3]))
    assert torch.equal(small.weight, linear.weight[[2, 0]][:, [1, 4, 3]]) and torch.equal(small.bias, linear.bias[[2, 0]])
    assert (small.in_features, small.out_features) == (3, 2) and (linear.in_features, linear.out_features) == (5, 4)
    assert width.narrow(nn.Linear(5, 4, bias=False), rows=torch.tensor([1])).bias is None
    small(torch.ones(3)).sum().backward()
    assert linear.weight.grad.sum() == 6                                      # through the selection


@pytest.mark.parametrize("active", [(0,), (1, 3), (0, 1, 2, 3)])
def test_fewer_heads_equal_the_others_at_zero(attn, active):
    gates = torch.tensor([[float(i in active) for i in range(4)]] * 2, dtype=torch.float64)
    layer = width.Heads(attn)
    layer.open = gates
    masked = layer(X)
    layer.open = active
    torch.testing.assert_close(layer(X), masked, atol=1e-12, rtol=0)
    assert attn.heads == 4 and attn.to_q.out_features == 12
    layer.open = None
    assert torch.equal(layer(X), attn(X))


def test_what_no_head_gives_is_the_bias(attn):
    layer = width.Heads(attn)
    layer.open = torch.zeros(2, 4)
    torch.testing.assert_close(layer(X), attn.to_out[0].bias.expand(2, 7, 12))


@pytest.mark.parametrize("active", [(0,), (1, 3), (0, 1, 2, 3)])
def test_fewer_channels_equal_the_others_at_zero(ff, active):
    layer = width.Channels(ff, 4)
    layer.open = torch.tensor([[float(i in active) for i in range(4)]] * 2, dtype=torch.float64)
    masked = layer(X)
    layer.open = active
    torch.testing.assert_close(layer(X), masked, atol=1e-12, rtol=0)
    hidden = ff.net[0](X).unflatten(-1, (4, 12))
    hidden[..., [i for i in range(4) if i not in active], :] = 0
    torch.testing.assert_close(masked, ff.net[2](hidden.flatten(-2)), atol=1e-12, rtol=0)


def test_gates_differ_within_a_batch_and_have_the_gradient_before_the_activation(ff):
    plain, z = ff(X), ff.net[0].proj(X[:1]).unflatten(-1, (4, 12))
    layer = width.Channels(ff, 4)
    layer.open = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.float64, requires_grad=True)
    out = layer(X)
    torch.testing.assert_close(out[1], plain[1], atol=1e-12, rtol=0)
    assert (out[0] - plain[0]).abs().max() > 0.01
    out[0].sum().backward()
    slope = ff.net[2].weight.sum(0).unflatten(-1, (4, 12))                    # of the sum, by hidden channel
    expected = (z * slope * 0.5).sum((0, 1, 3))                               # the slope of a GELU at 0 is 1/2
    torch.testing.assert_close(layer.open.grad[0, [1, 3]], expected[[1, 3]], atol=1e-9, rtol=0)
