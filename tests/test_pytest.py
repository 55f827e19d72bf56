"""Plain `pytest` imports what `python -m pytest` does: the package `methods`, not tests/methods, and all of this tree."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WHERE = """import accel_kernels.rows
import accel_tools.catalog
import beside
import methods


def test_where(pytestconfig):
    for module in (accel_kernels.rows, accel_tools.catalog, beside, methods):
        assert module.__file__.startswith(str(pytestconfig.rootpath)), module.__file__
    assert methods.tiny
"""


@pytest.fixture
def checkout(tmp_path):
    """Another checkout than the one that the interpreter has installed."""
    for folder in ("methods", "kernels", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (tmp_path / "tests/methods").mkdir(parents=True)
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "tests/beside.py").write_text("")
    (tmp_path / "tests/methods/test_where.py").write_text(WHERE)
    return tmp_path


@pytest.mark.parametrize("command", [[str(Path(sys.executable).with_name("pytest"))], [sys.executable, "-m", "pytest"]],
                         ids=["pytest", "python -m pytest"])
def test_a_checkout_tests_itself(checkout, command):
    done = subprocess.run([*command, "-q", "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=checkout)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
