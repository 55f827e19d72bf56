"""The attention product, whatever processor makes it."""
import pytest
import torch
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from families import FAMILIES, FIRST, Family

from methods._core.attention import at_product, mean_map, unmasked, with_mass
from methods._core.patch import Patch

X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


def plain(product, q, k, v, **more):
    return product(q, k, v, **more)


def attention(**more):
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8, **more).eval()


def test_it_is_called_with_what_the_module_would_multiply():
    attn, seen = attention(qk_norm="layer_norm"), []

    def attend(product, q, k, v, **more):
        seen.append((q, k, v))
        return 2 * product(q, k, v, **more)

    out = at_product(attend)(attn.forward, X)
    q, k, v = (norm(p(X).unflatten(2, (2, 8)).transpose(1, 2)) for p, norm in
               ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, lambda x: x)))
    assert all(torch.equal(a, b) for a, b in zip(seen[0], (q, k, v), strict=True)) and len(seen) == 1
    heads = 2 * torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, attn.to_out[0](heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("name", FIRST)
def test_passing_it_on_changes_nothing_on_any_family(name):
    """Also with fused projections, which some families have."""
    family = FAMILIES[name]
    for fuse in (False, True):
        pipe = family.pipe()
        if fuse and not hasattr(Family.model(pipe), "fuse_qkv_projections"):
            continue
        if fuse:
            Family.model(pipe).fuse_qkv_projections()
        expected, patch = family.run(pipe), Patch(pipe, "watch")
        for block in patch.denoiser.blocks:
            patch.attend(block.attn, plain)
        with patch.on():
            assert torch.equal(family.run(pipe), expected)


def test_only_the_first_product_is_served():
    """Later ones, as those of an adapter's images, pass by."""
    attn, seen = attention(), []

    def twice(*args, **kwargs):
        return attn.forward(*args, **kwargs) + attn.forward(*args, **kwargs)

    out = at_product(lambda product, q, k, v, **more: seen.append(1) or torch.zeros_like(q))(twice, X)
    assert seen == [1]
    torch.testing.assert_close(out, attn(X) + attn.to_out[0].bias)


def test_an_attention_without_a_product_says_so():
    attn = attention()
    attn.set_processor(SlicedAttnProcessor(1))
    with pytest.raises(RuntimeError, match="makes no scaled dot product"):
        at_product(plain)(attn.forward, X)


def test_map_and_mass():
    q, k, v = torch.randn(3, 2, 2, 6, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    maps = torch.stack([torch.stack([(q[b, h] @ k[b, h].T * 0.3).softmax(-1) for h in range(2)]) for b in range(2)])
    torch.testing.assert_close(mean_map(q, k, scale=0.3), maps.mean(1))
    out, mass = with_mass(q, k, v, scale=0.3)
    torch.testing.assert_close(out, maps @ v)
    torch.testing.assert_close(mass, maps.mean(1).sum(1))
    keep = torch.tensor([True, True, False, True, True, True])
    bias = torch.zeros(6).masked_fill(~keep, -torch.inf)
    found = mean_map(q, k, attn_mask=keep)
    torch.testing.assert_close(found, mean_map(q, k, attn_mask=bias))
    assert not found[..., 2].any()
    out, mass = with_mass(q, k, v, attn_mask=keep[None])
    torch.testing.assert_close(mass, found.sum(1))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]))
    few = with_mass(q, k[:, :1], v[:, :1])                           # keys with fewer heads
    for a, b in zip(few, with_mass(q, *(x[:, :1].expand(-1, 2, -1, -1) for x in (k, v))), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="has a mask"):
        unmasked(bias)
    assert unmasked(None) is None
