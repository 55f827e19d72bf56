import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
TARGETS = ("--target", "sm_90", "--target", "gfx942")


def compile_kernels(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # which the tool has to undo
    command = [sys.executable, str(SCRIPT), "--kernel", "cosine_match", "--dtype", "fp16", *TARGETS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_launched_tile_compiles_without_a_spill(tmp_path):
    result = compile_kernels("--json", str(tmp_path / "table.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["target"] for row in table} == {"sm_90", "gfx942"}
    for row in table:
        assert row["spill_bytes"] == 0 and not row["problems"]
        assert 0 < row["registers"] <= 512
        assert row["bytes_moved"] >= row["bytes_least"] > 0


def test_a_tile_that_spills_is_refused():
    result = compile_kernels("--tile", "BS=256", "BD=256")
    assert result.returncode == 1
    assert "spills" in result.stdout and "2 compiled, 2 refused" in result.stdout


def test_a_tiny_tile_is_refused():
    result = compile_kernels("--tile", "BD=16")
    assert result.returncode == 1
    assert "BD=16 is below the floor of 64" in result.stdout


def test_unknown_kernels_are_an_error():
    result = subprocess.run([sys.executable, str(SCRIPT), "--kernel", "nothing"], capture_output=True, text=True)
    assert result.returncode == 2 and "no kernel's name starts with ['nothing']" in result.stderr
