"""Patches and blocks, held to those of other libraries."""
import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn

from methods._core.parts import Block, learnt, patchify, unpatchify


def tokens(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("patch, height, width, channels", [(1, 3, 5, 2), (2, 4, 6, 3), (4, 8, 4, 1)])
def test_patches_go_back(patch, height, width, channels):
    x = tokens(2, channels, height, width)
    parts = patchify(x, patch)
    assert parts.shape == (2, height * width // patch ** 2, patch ** 2 * channels)
    assert torch.equal(unpatchify(parts, patch, height // patch), x)


def test_a_linear_map_of_patches_is_a_strided_convolution():
    conv, x = nn.Conv2d(3, 5, 4, stride=4).double(), tokens(2, 3, 8, 12)
    found = patchify(x, 4) @ conv.weight.permute(0, 2, 3, 1).flatten(1).T + conv.bias
    torch.testing.assert_close(found, conv(x).flatten(2).mT)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="patch=4 must divide both sides of the image, which is 8x6"):
        patchify(torch.zeros(1, 3, 8, 6), 4)
    with pytest.raises(ValueError, match="heads=3 must divide the width 8"):
        Block(8, 3)


def test_learnt_tokens_have_about_unit_length():
    found = learnt(400, 64)
    assert found.shape == (400, 64) and found.requires_grad
    assert float(found.detach().square().sum(-1).mean()) == pytest.approx(1, abs=0.05)


def test_the_plain_block_is_that_of_torch():
    block = Block(12, 3).double()
    layer = nn.TransformerEncoderLayer(12, 3, 48, dropout=0, activation="gelu", batch_first=True, norm_first=True).double()
    layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data = block.qkv.weight.data, block.qkv.bias.data
    for mine, theirs in ((block.out, layer.self_attn.out_proj), (block.mlp[0], layer.linear1), (block.mlp[2], layer.linear2)):
        theirs.load_state_dict(mine.state_dict())
    x = tokens(2, 7, 12)
    torch.testing.assert_close(block(x), layer(x))


def test_with_a_condition_it_starts_as_the_identity_and_is_the_block_of_dit():
    block, x, condition = Block(12, 3, cond=5).double(), tokens(2, 7, 12), tokens(2, 5, seed=1)
    assert torch.equal(block(x, condition), x)
    model = DiTTransformer2DModel(num_attention_heads=3, attention_head_dim=4, in_channels=1, out_channels=1, num_layers=1,
                                  sample_size=4, patch_size=2, num_embeds_ada_norm=10, activation_fn="gelu").double().eval()
    theirs, block = model.transformer_blocks[0], Block(12, 3, cond=12).double()
    theirs.norm3.eps = 1e-6                                       # of the authors; the library has it in its first norm only
    theirs.attn1.to_q.weight.data, theirs.attn1.to_k.weight.data, theirs.attn1.to_v.weight.data = block.qkv.weight.data.chunk(3)
    theirs.attn1.to_q.bias.data, theirs.attn1.to_k.bias.data, theirs.attn1.to_v.bias.data = block.qkv.bias.data.chunk(3)
    theirs.attn1.to_out[0].load_state_dict(block.out.state_dict())
    theirs.ff.net[0].proj.load_state_dict(block.mlp[0].state_dict())
    theirs.ff.net[2].load_state_dict(block.mlp[2].state_dict())
    block.modulation[1].load_state_dict(theirs.norm1.linear.state_dict())
    t, labels = torch.tensor([3, 8]), torch.tensor([1, 4])
    condition = theirs.norm1.emb(t, labels, hidden_dtype=torch.float64)
    torch.testing.assert_close(block(x[:, :4], condition), theirs(x[:, :4], timestep=t, class_labels=labels))
