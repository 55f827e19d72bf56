"""The table of all methods on a pipeline of one's own."""
import pytest
from families import FAMILIES

from accel_tools import check_pipe


def flux():
    return FAMILIES["flux"].pipe(), {**FAMILIES["flux"].call(1, 0), "height": 32, "width": 32, "output_type": "latent"}


def test_without_sampling(capsys):
    assert check_pipe.main(["--pipe", f"{__name__}:flux", "--dry"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FluxTransformer2DModel: ") and any(line.split()[:2] == ["fora", "applies"] for line in lines)
    assert any(line.startswith("deepcache") and "refuses" in line for line in lines)


@pytest.mark.slow
def test_with_a_run_of_each(capsys):
    assert check_pipe.main(["--pipe", f"{__name__}:flux", "--arguments", '{"num_inference_steps": 4}']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["tome", "engaged"] and "left out" in line for line in lines)


@pytest.mark.parametrize("pipe, words", [("no/folder", "is neither a folder nor module:function"),
                                         (f"{__name__}:nothing", "has no attribute")])
def test_what_is_no_pipeline_is_named(pipe, words, capsys):
    assert check_pipe.main(["--pipe", pipe]) == 1
    assert words in capsys.readouterr().err
