"""A method is trained by what its module says: stage by stage, resumably, into a file and a card."""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import methods
from accel_tools import train_zoo
from accel_tools.measure import trained
from accel_tools.measure.tasks import TASKS
from accel_tools.zoo import digits
from methods import dydit

pytestmark = pytest.mark.slow


@pytest.fixture
def short(monkeypatch, tmp_path):
    """DyDiT in four steps of four squares in place of digits, in folders of the test."""
    squares = torch.full((40, 1, 32, 32), -1.0)
    squares[:, :, 12:20, 12:20] = 1.0
    monkeypatch.setattr(digits, "split", lambda held_out: (squares, torch.arange(40) % 10))
    monkeypatch.setattr("methods._trained.FOLDER", tmp_path)
    monkeypatch.setattr(trained, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(dydit, "TRAINED", {"tiny": dydit.TINY})
    monkeypatch.setattr(dydit, "RIVALS", {"tiny": {"fixed share": dataclasses.replace(dydit.TINY, seed=1)}}, raising=False)
    monkeypatch.setitem(TASKS, "dit", dataclasses.replace(TASKS["dit"], steps=2))
    whole = dydit.training
    monkeypatch.setattr(dydit, "training", lambda pipe, config: [
        dataclasses.replace(stage, steps=4, batch=4) for stage in whole(pipe, config)])
    return tmp_path


def test_weights_card_and_what_they_are_worth(short, capsys):
    assert train_zoo.main(["--method", "dydit", "--images", "12"]) == 0
    assert "share" in capsys.readouterr().out
    card = json.loads((short / "tiny.json").read_text())
    assert card["method"] == "dydit" and card["config"]["tau"] == 5.0 and card["stages"][0]["steps"] == 4
    assert card["stages"][0]["shown"] == ["step", "loss", "dynamic", "share", "target"] and len(card["loss"][0][-1]) == 5
    assert card["bytes"] == methods.weights("tiny").stat().st_size and card["loss"][0][-1][0] == 4
    plain, found = card["metrics"]["plain"], card["metrics"]["dydit"]
    assert found["macs_per_image"] < plain["macs_per_image"] and plain["steps"] == found["steps"] == 2
    assert card["metrics"]["plain, fewer steps"]["steps"] == 1 and card["metrics"]["n"] == 12
    assert card["metrics"]["fixed share"]["steps"] == 2 and (short / "checkpoints/tiny-fixed-share-0.ckpt").exists()
    low, high = plain["frechet_spread"]
    assert low <= plain["frechet"] <= high and [path.stem for path in short.glob("*.safetensors")] == ["tiny"]
    state = load_file(methods.weights("tiny"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float16} and "routers.0.heads.weight" in state
    assert all("ff.inner" in name or name.startswith("routers.") for name in state)
    (short / "tiny.safetensors").unlink()
    trained.train_method("dydit", "tiny", 0, 1.0, "")                            # the checkpoint is at its end
    assert "continuing tiny-0 at step 4 of 4" in capsys.readouterr().out
    assert all(torch.equal(value, state[name]) for name, value in load_file(methods.weights("tiny")).items())


@pytest.mark.parametrize("args, words", [
    (["--method", "tests"], "No module named 'methods.tests'"), (["--method", "nothing"], "No module named 'methods.nothing'"),
    (["--method", "dydit", "dydit-60"], "'dydit-60' is none of dydit-50, dydit-70"), ([], "None is none of judge")])
def test_what_cannot_be_trained_is_named(args, words, capsys):
    with pytest.raises(SystemExit):
        train_zoo.main(args)
    assert words in capsys.readouterr().err
