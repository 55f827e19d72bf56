"""The search of a recipe from the shell: answer, journal and picture."""
import json

import pytest

import methods
from accel_tools import tune_pipe
from accel_tools.measure import records
from methods._core.tune import Point, Recipe, Tuned


def emoji():
    return methods.tiny("mmdit"), {"max_sequence_length": 1}


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\n\ndog\n")
    return file


@pytest.mark.slow
def test_a_recipe_its_journal_and_a_picture(prompts, tmp_path, capsys):
    out = tmp_path / "found.json"
    command = ["--pipe", f"{__name__}:emoji", "--prompts", str(prompts), "--steps", "6", "--method", "fora", "--out", str(out),
               "--budget", "speedup>=1.01"]
    assert tune_pipe.main(command) == 0
    said = capsys.readouterr().out
    assert "SD3Transformer2DModel, 6 steps, speedup>=1.01: " in said and "methods.load" in said
    found = json.loads(out.read_text())
    assert found["model"] == "SD3Transformer2DModel" and found["plain_steps"] == 6
    assert (tmp_path / "found.svg").read_text().count("fewer steps") >= 1
    before = (tmp_path / "found.jsonl").read_text()
    assert tune_pipe.main(command) == 0 and (tmp_path / "found.jsonl").read_text() == before
    with methods.load(emoji()[0], out) as applied:
        assert applied.steps == found["steps"]


@pytest.mark.parametrize("more, words", [
    (["--budget", "fast"], "must be one of"), (["--prompts", "no/file"], "--prompts:"),
    (["--pipe", "nowhere"], "is neither a folder"),
])
def test_bad_input_is_named(more, words, prompts, tmp_path, capsys):
    out = tmp_path / "x.json"
    assert tune_pipe.main(["--pipe", f"{__name__}:emoji", "--prompts", str(prompts), "--out", str(out), *more]) == 1
    assert words in capsys.readouterr().err and not out.exists()


def test_a_picture_where_no_method_runs(tmp_path):
    fewer = Point(Recipe(3), "engaged", 2.0, 30.0)
    refused = Point(Recipe(6, (("fora", "{}"),)), "refuses", why="x")
    alone = Tuned("Model", Recipe(6), "psnr>=20", fewer, (fewer,), (fewer, refused))
    tune_pipe.picture(alone, tmp_path / "found.svg")
    assert "fewer steps" in (tmp_path / "found.svg").read_text()


def test_points_of_the_bundled_models_are_written_from_a_committed_tree_only(monkeypatch, capsys):
    monkeypatch.setattr(records, "changed", lambda root: ["methods/a.py"])
    with pytest.raises(SystemExit):
        tune_pipe.main(["--zoo", "dit"])
    assert "the tree differs from its commit in methods/a.py" in capsys.readouterr().err


def test_something_must_be_named(capsys):
    with pytest.raises(SystemExit):
        tune_pipe.main([])
