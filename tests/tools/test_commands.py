"""Commands run as files and as modules, and act on the tree they lie in."""
import re
import shutil
import subprocess
import sys

import pytest

from accel_tools.catalog import ROOT


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["check_catalog", "render_readme", "new_entry", "new_family", "tune_pipe", "export",
                                  "render_site"])
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


def test_a_method_is_started_in_the_tree_of_the_command(other):
    slug = "tome"                                            # stands in the other checkout, where it would be refused
    flags = ["--kind", "patch", "--title", "T", "--authors", "Ann Bee", "--year", "2025", "--arxiv", "2503.00010"]
    done = run(other / "tools/new_entry.py", "--slug", slug, "--name", "X", *flags)
    assert done.returncode == 0, done.stderr
    for path in (f"catalog/entries/{slug}.yaml", f"methods/{slug}.py", f"tests/methods/test_{slug}.py"):
        assert (other / path).exists()


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


@pytest.mark.slow
def test_a_new_process_keeps_to_the_tree(other):
    (other / "tools/where.py").write_text("from accel_tools.measure.memory import in_fresh_process\n"
                                          "from accel_tools.catalog.rules import allowed\n"
                                          "def told():\n    return allowed.__code__.co_filename\n"
                                          "if __name__ == '__main__':\n    print(in_fresh_process(told))\n")
    done = run(other / "tools/where.py")
    assert done.stdout.strip() == str(other / "tools/catalog/entries.py"), done.stderr


EVERY = """
import os, runpy, sys
import diffusers, torch                      # once for all commands
own, other = sys.argv[1:3]
failed = 0
for tool in sorted(name for name in os.listdir(own + "/tools") if name.endswith(".py") and name != "accel_tools.py"):
    if (child := os.fork()):
        failed += os.waitpid(child, 0)[1] != 0
        continue
    sys.path[0], status = own + "/tools", 1
    try:
        runpy.run_path(f"{own}/tools/{tool}", run_name="imported")
        files = {getattr(module, "__file__", None) or "" for module in sys.modules.values()}
        strange = sorted(file for file in files if file.startswith((other + "/methods", other + "/kernels", other + "/tools")))
        mine = [file for file in files if file.startswith(own + "/")]
        print(tool, len(mine), *strange, flush=True)
        status = bool(strange)
    finally:
        os._exit(status)
sys.exit(failed)
"""


@pytest.mark.slow
def test_no_command_imports_anything_of_another_checkout(tmp_path):
    """Of two copies of the tree: the one that the interpreter has installed, and the one whose commands it runs."""
    own = tmp_path / "copy"
    for folder in ("methods", "kernels", "tools"):
        shutil.copytree(ROOT / folder, own / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    done = run("-c", EVERY, own, ROOT, cwd=ROOT)
    told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and all(len(rest) == 1 for rest in told.values()), done.stdout + done.stderr[-2000:]
    assert told.keys() == {path.name for path in (ROOT / "tools").glob("*.py")} - {"accel_tools.py"}
    assert all(int(count) > 3 for tool, [count] in told.items() if tool != "serve.py"), told        # it only serves files
