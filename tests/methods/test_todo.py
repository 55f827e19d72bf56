from dataclasses import replace

import pytest
import torch
from contracts import patch as contract
from diffusers.models.attention_processor import Attention
from families import FAMILIES

from methods import todo
from methods._core.attention import at_product
from methods._core.denoiser import describe


@pytest.mark.parametrize("check, case", contract.cases(todo, todo.Config(factor=2)), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("factor, method, rows", [
    (2, "nearest", [0, 2, 4, 6, 8, 10]), (3, "nearest", [0, 3, 6, 9]), (2, "nearest-exact", [1, 3, 5, 7, 9, 11]),
    (3, "nearest-exact", [1, 4, 7, 10]), (4, "nearest-exact", [2, 6, 10])])
def test_chosen_rows(factor, method, rows):
    assert todo.subgrid(1, 12, 1, factor, method).tolist() == rows


@pytest.mark.parametrize("height, width, factor", [(8, 8, 2), (9, 13, 2), (10, 7, 3), (16, 24, 4)])
@pytest.mark.parametrize("method", ["nearest", "nearest-exact"])
def test_subgrid_is_nearest_neighbour_interpolation(height, width, factor, method):
    places = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    size = height // factor, width // factor
    expected = torch.nn.functional.interpolate(places, size=size, mode=method).flatten().long()
    assert torch.equal(todo.subgrid(1, height, width, factor, method), expected)


def attention(x, index):
    torch.manual_seed(0)
    pipe = FAMILIES["unet"].pipe()
    attn = Attention(query_dim=x.shape[-1], heads=2, dim_head=4).to(x.dtype)
    downsample = todo._Downsample(replace(describe(pipe.unet).blocks[0], attn=attn))
    downsample.index, downsample.tokens = index, x.shape[1]
    at = at_product(downsample.attend)(attn, x)                     # the two places where rows can be left out
    torch.testing.assert_close(downsample.image(attn, x), at)
    return attn(x), at


def test_exact_where_cells_are_constant():
    cells = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)             # an 8 x 12 grid of 2 x 2 cells
    full, down = attention(x, todo.subgrid(1, 8, 12, 2))
    torch.testing.assert_close(down, full)


def test_all_queries_are_kept_and_sampling_commutes_with_projection():
    x, index = torch.randn(2, 96, 8), todo.subgrid(1, 8, 12, 2)
    full, down = attention(x, index)
    assert down.shape == full.shape and len(index) == 24
    linear = torch.nn.Linear(8, 8)
    torch.testing.assert_close(linear(x[:, index]), linear(x)[:, index])


def test_level_two_has_its_own_factor():
    pipe = FAMILIES["unet"].pipe()
    counts = []
    for factor in (1, 2):
        with todo.apply(pipe, todo.Config(factor=factor, factor_level_2=2)) as patch:
            FAMILIES["unet"].run(pipe, steps=2)
            counts.append(patch.report()["downsampled"])
    assert counts[1] > counts[0] > 0


@pytest.mark.parametrize("wrong, named", [({"factor": 0}, "factor=0"), ({"method": "area"}, "method='area'")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        todo.Config(**wrong)
