from dataclasses import dataclass

import pytest
import torch
from torch import nn

from methods import _trained, weights
from methods._core.learning import check_sizes, enter, load, save, train_only, trained


def model(*, parts=("0.",), width=3):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))
    train_only(made, parts)
    return made


def test_only_what_is_named_trains():
    assert list(trained(model())) == ["0.weight", "0.bias"]
    assert len(trained(model(parts=None))) == 4 and not trained(model(parts=()))
    with pytest.raises(ValueError, match="'2.' is part of no parameter's name"):
        model(parts=("0.", "2."))


def test_a_file_keeps_every_bit_or_half_of_them(tmp_path):
    made, other = model(), model()
    with torch.no_grad():
        for weight in made.parameters():
            weight.uniform_()
    frozen = other[1].weight.clone()
    save(made, tmp_path / "a.safetensors")
    load(other, tmp_path / "a.safetensors")
    assert torch.equal(other[0].weight, made[0].weight) and torch.equal(other[1].weight, frozen)
    save(made, tmp_path / "b.safetensors", torch.float16)
    load(other, tmp_path / "b.safetensors")
    assert torch.equal(other[0].weight, made[0].weight.half().float()) and other[0].weight.dtype == torch.float32
    assert (tmp_path / "b.safetensors").stat().st_size < (tmp_path / "a.safetensors").stat().st_size


@pytest.mark.parametrize("other, words", [
    (dict(parts=None), "part.safetensors lacks 1.bias, 1.weight"), (dict(parts=("0.weight",)), "also holds 0.bias"),
    (dict(width=4), r"0.weight in part.safetensors has shape \(3, 2\), not \(4, 2\)")])
def test_a_file_of_another_part_is_refused_before_anything_changes(tmp_path, other, words):
    save(model(), tmp_path / "part.safetensors")
    made = model(**other)
    with torch.no_grad():
        made[0].weight.fill_(7)
    with pytest.raises(ValueError, match=words):
        load(made, tmp_path / "part.safetensors")
    assert (made[0].weight == 7).all()


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no parameter of this Sequential trains"):
        save(model(parts=()), tmp_path / "none.safetensors")


def test_an_unknown_name_lists_the_known_ones():
    known = sorted(path.stem for path in _trained.FOLDER.glob("*.safetensors"))
    with pytest.raises(ValueError, match=f"no trained weights 'none'; there are: {', '.join(known)}"):
        weights("none")


def test_a_stage_trains_its_parts():
    made = model(parts=None)
    found = enter(made, {"first": ("0",), "both": ("0", "1")}, "first")
    assert [weight.shape for weight in found] == [(3, 2), (3,)] and not made[1].weight.requires_grad
    assert len(enter(made, {"first": ("0",), "both": ("0", "1")}, "both")) == 4
    with pytest.raises(ValueError, match="stage='last' must be one of first, both"):
        enter(made, {"first": ("0",), "both": ("0", "1")}, "last")


@dataclass(frozen=True)
class Sizes:
    whole: int = 6
    part: int = 3
    layers: int = 1
    share: float = 0.5
    seed: int = 0

    def __post_init__(self):
        check_sizes(self, [("part", "whole"), (2, "whole")], none=["layers"])


@pytest.mark.parametrize("wrong, words", [({"part": 4}, "part=4 must divide whole=6"), ({"whole": 3}, "2 must divide whole=3"),
                                          ({"part": 0}, "part=0 must be at least 1"), ({"share": -0.1}, "share=-0.1"),
                                          ({"share": float("nan")}, "share=nan"), ({"layers": -1}, "layers=-1 .* at least 0")])
def test_sizes_that_do_not_fit_are_refused(wrong, words):
    assert Sizes(layers=0, seed=-1).whole == 6
    with pytest.raises(ValueError, match=words):
        Sizes(**wrong)
