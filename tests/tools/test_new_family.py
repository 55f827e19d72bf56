"""A new family starts as a row that was proved and a test that asks for what is missing; or as nothing."""
import ast

import pytest
from families import FAMILIES

from accel_tools import new_family
from methods._core.families import families, find

FILES = ["methods/_core/families/shiny_new.py", "tests/families/shiny_new.py"]


def pixart():
    return FAMILIES["pixart"].pipe(), {**FAMILIES["pixart"].call(1, 0), "height": 32, "width": 48}


def unet():
    return FAMILIES["unet"].pipe(), {**FAMILIES["unet"].call(1, 0), "height": 32, "width": 48}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run the tool on a pipeline of this file, whose class has lost its row."""
    for name in ("PixArtTransformer2DModel", "UNet2DConditionModel"):
        monkeypatch.delitem(families(), name)

    def run(*flags, name="shiny-new", pipe=f"{__name__}:pixart") -> int:
        return new_family.main(["--root", str(tmp_path), "--name", name, "--pipe", pipe, *flags])
    return run


def test_it_writes_the_row_that_it_proved(start, tmp_path, capsys):
    assert start() == 0
    row, test = ((tmp_path / path).read_text() for path in FILES)
    said, heard = capsys.readouterr()
    assert "permutation  passed" in said and "the grid ..." in heard
    assert "FILL" in row and test.count("FILL") == 3
    made = {}
    exec(row, made)
    assert made["FAMILY"].name == "shiny-new" and made["FAMILY"].classes == ("PixArtTransformer2DModel",)
    assert [blocks.at for blocks in made["FAMILY"].lists] == ["transformer_blocks"]
    assert find(type(pixart()[0].transformer)) is None                      # nothing is left in this process
    ast.parse(test)
    assert max(map(len, (row + test).splitlines())) <= 128
    assert start() == 1 and "exists" in capsys.readouterr().err
    assert (tmp_path / FILES[0]).read_text() == row


@pytest.mark.parametrize("how, reason", [
    (dict(name="wan"), "there is a family wan"), (dict(name="Wan 3"), "must be lower-case words"),
    (dict(pipe="nowhere"), "neither a folder nor module:function"), (dict(pipe="no_such:module"), "no_such"),
    (dict(pipe=f"{__name__}:nothing"), "nothing"), (dict(pipe="builtins:dict"), "must return"),
    (dict(pipe=f"{__name__}:unet"), "not everything is proved")])
def test_it_refuses_with_a_reason(start, tmp_path, capsys, how, reason):
    assert start(**how) == 1
    said = capsys.readouterr()
    assert reason in said.err and said.err.endswith("nothing written\n")
    assert not any((tmp_path / path).exists() for path in FILES)


def test_it_refuses_a_class_that_has_a_row(tmp_path, capsys):
    assert new_family.main(["--root", str(tmp_path), "--name", "x", "--pipe", f"{__name__}:pixart"]) == 1
    assert "has a row, pixart" in capsys.readouterr().err
