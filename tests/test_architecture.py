"""Who may import what, read from the source. The layers are told in site/guide/architecture.md."""
from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ENTRIES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "catalog/entries").glob("*.yaml")}
DRAWERS = {"utils", "util", "helpers", "common", "base", "manager", "misc"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def files(folder: str, pattern: str = "*.py") -> list[Path]:
    return sorted((ROOT / folder).rglob(pattern))


def test_kernels_know_only_torch_and_triton_stays_in_its_folder():
    for path in files("kernels"):
        third_party = tops(path) - set(sys.stdlib_module_names) - {"accel_kernels"}
        allowed = {"torch", "triton"} if path.parent.name == "_triton" else {"torch"}
        assert third_party <= allowed, path
    for path in {*files("methods"), *files("tools")} - {ROOT / "tools/compile_kernels.py", ROOT / "tools/measure/kernels.py"}:
        assert "triton" not in tops(path), path


def test_core_and_zoo_know_no_method_and_no_tool():
    for path in [*files("methods/_core"), *files("methods/_zoo"), *files("methods/_trained")]:
        assert not {f"methods.{slug}" for slug in ENTRIES} & imports(path), path
        assert "accel_tools" not in tops(path), path


def test_methods_import_only_what_their_entry_builds_on():
    for path in files("methods", "[a-z]*.py"):
        if path.parent != ROOT / "methods":
            continue
        entry, names = ENTRIES[path.stem], imports(path)
        others = {name.split(".")[1] for name in names if name.startswith("methods.")} & set(ENTRIES)
        assert others <= set(entry["builds_on"]), path
        assert not tops(path) & {"accel_tools", "tests"}, path


ROOMS = ("catalog", "pages", "zoo", "measure")          # of tools; each may import those before it, and commands all of them


def modules_of_tools() -> dict[str, set[str]]:
    """Module of accel_tools -> the modules of it that it imports."""
    paths = {".".join(("accel_tools", *path.relative_to(ROOT / "tools").with_suffix("").parts)).removesuffix(".__init__"): path
             for path in files("tools")}
    return {name: imports(path) & paths.keys() - {name} for name, path in paths.items()}


def test_tools_lie_in_rooms_by_job():
    for name, needed in modules_of_tools().items():
        room = name.split(".")[1]
        if room in ROOMS:
            strange = {other for other in needed if other.split(".")[1] not in ROOMS[:ROOMS.index(room) + 1]}
            if name == "accel_tools.measure.growth":             # times the checker
                strange -= {"accel_tools.check_catalog"}
            assert not strange, name


def test_tools_import_in_no_circle():
    assert list(graphlib.TopologicalSorter(modules_of_tools()).static_order())


def test_no_drawers():
    for folder in ("methods", "kernels", "tools"):
        assert not [path for path in files(folder) if path.stem.strip("_") in DRAWERS]


def test_kernels_is_not_the_package_that_transformers_probes_for():
    assert not (ROOT / "kernels/__init__.py").exists()
    for folder in ("methods", "kernels", "tools", "tests"):
        for path in files(folder):
            assert "kernels" not in tops(path), path
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


@pytest.mark.parametrize("blocked, code", [
    ("triton", "from methods import tome; import torch; from accel_kernels.merge import merge, segments;"
               "merge(torch.ones(1, 4, 2), segments(torch.zeros(1, 4, dtype=torch.long), 1))"),
    ("pydantic", "from methods import tome, fora"), ("jinja2", "from methods import tiny"),
    ("pytest", "from methods import tome"),
    ("torch", "import accel_tools.check_catalog, accel_tools.render_readme, accel_tools.render_site, accel_tools.export")])
def test_imports_do_without(blocked, code):
    """The library needs no development dependency and no triton; the catalogue tools need no torch."""
    script = f"import sys; sys.modules[{blocked!r}] = None; {code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
