"""Parts of a model that stand around others."""
import copy

import pytest
import torch
from families import FAMILIES
from torch import nn

import methods
from methods._core.around import Around, First, FirstAsk, image_blocks, swap


class Doubled(Around):
    def forward(self, x):
        return 2 * self.inner(x)


def test_what_it_lacks_is_asked_of_what_it_holds():
    made = Doubled(nn.Linear(2, 3))
    made.mine = 1
    assert made.in_features == 2 and made.weight is made.inner.weight and made.mine == 1
    with pytest.raises(AttributeError, match="nothing"):
        assert made.nothing
    other = copy.deepcopy(made)
    assert other.weight is not made.weight and torch.equal(other(torch.ones(2)), made(torch.ones(2)))


def test_parts_are_swapped_where_they_are_children():
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(first, nn.Sequential(last, nn.ReLU()))
    swap(model, {each: Doubled(each) for each in (first, last)})
    assert isinstance(model[0], Doubled) and model[0].inner is first and model[1][0].inner is last
    x = torch.ones(1, 2)
    assert torch.equal(model(x), nn.functional.relu(2 * last(2 * first(x))))


def test_only_the_first_tokens_are_computed():
    part, x = First(nn.Linear(3, 3)), torch.randn(2, 5, 3)
    part.count = 2
    out = part(x)
    torch.testing.assert_close(out[:, :2], part.inner(x[:, :2]))
    assert out.shape == x.shape and not out[:, 2:].any()


def test_the_first_tokens_ask_the_others():
    attn = methods.tiny("dit").transformer.transformer_blocks[0].attn1
    part, x = FirstAsk(attn), torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0))
    part.count = 3
    out = part(x, encoder_hidden_states=None, attention_mask=None)
    torch.testing.assert_close(out[:, :3], attn(x[:, :3], encoder_hidden_states=x[:, 3:]))
    assert out.shape == x.shape and not out[:, 3:].any()


def test_which_models_have_blocks_over_an_image_alone():
    for name in ("dit", "pixart"):
        assert len(image_blocks(FAMILIES[name].pipe().transformer, "it")) == 3
    for name in ("unet", "sd3", "flux", "latte"):
        pipe = FAMILIES[name].pipe()
        model = getattr(pipe, "unet", None) or pipe.transformer
        with pytest.raises(ValueError, match=f"it: this {type(model).__name__} has no chain"):
            image_blocks(model, "it")
