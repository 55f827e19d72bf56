"""Commands run as files and as modules, and act on the tree they lie in."""
import re
import shutil
import subprocess
import sys

import pytest

from accel_tools.catalog import ROOT


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("tool", ["check_catalog", "render_readme", "new_entry", "export", "render_site"])
def test_they_run_as_scripts_and_as_modules(tool):
    for command in ([f"tools/{tool}.py"], ["-m", f"accel_tools.{tool}"]):
        done = run(*command, "--help")
        assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


@pytest.fixture
def other(toy):
    """Another checkout than the one that this interpreter has installed: the tools over a made-up catalogue."""
    shutil.copytree(ROOT / "tools", toy / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    return toy


def test_a_checkout_is_checked_by_its_own_tools(other, tmp_path):
    assert run(other / "tools/check_catalog.py").returncode == 0
    (other / "catalog/entries/method_2.yaml").write_text("name: [")
    for cwd in (other, ROOT, tmp_path):
        done = run(other / "tools/check_catalog.py", cwd=cwd)
        assert done.returncode == 1 and "method_2.yaml:2: not valid YAML" in done.stdout, done.stderr


def test_methods_and_kernels_are_those_of_the_same_tree(other):
    (other / "methods/__init__.py").write_text("")
    (other / "kernels").mkdir()
    (other / "kernels/rows.py").write_text("")
    (other / "tools/where.py").write_text("import accel_tools.catalog, accel_kernels.rows, methods.method_1 as method\n"
                                          "for each in (accel_tools.catalog, accel_kernels.rows, method):\n"
                                          "    print(each.__file__)\n")
    done = run(other / "tools/where.py")
    assert done.stdout.split() == [str(other / path) for path in
                                   ("tools/catalog/__init__.py", "kernels/rows.py", "methods/method_1.py")], done.stderr


def test_a_command_imports_its_own_tree_first():
    for path in (ROOT / "tools").glob("*.py"):
        found = re.findall(r"^(?:from|import) (accel_tools|accel_kernels|methods)\b", path.read_text(), re.M)
        assert not found or found[0] == "accel_tools", path


def test_a_new_process_keeps_to_the_tree(other):
    (other / "tools/where.py").write_text("from accel_tools.measure.memory import in_fresh_process\n"
                                          "from accel_tools.catalog.rules import allowed\n"
                                          "def told():\n    return allowed.__code__.co_filename\n"
                                          "if __name__ == '__main__':\n    print(in_fresh_process(told))\n")
    done = run(other / "tools/where.py")
    assert done.stdout.strip() == str(other / "tools/catalog/entries.py"), done.stderr
