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
QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
ENTRIES = {path.stem: yaml.load(path.read_text(), QUICK) for path in (ROOT / "catalog/entries").glob("*.yaml")}
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


def slugs_in(text: str) -> set[str]:
    """The methods that a string names and nothing else: `tome`, `methods.tome`, `tome fora`."""
    words = [word.removeprefix("methods.") for word in text.split()]
    return set(words) if words and set(words) <= ENTRIES.keys() else set()


def named(nodes) -> set[str]:
    """The methods that string constants below some nodes name."""
    return {slug for top in nodes for node in ast.walk(top) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            for slug in slugs_in(node.value)}


def outside_bodies(node: ast.AST):
    """What is evaluated at import: everything but the bodies of functions."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (field == "body" and isinstance(node, ast.FunctionDef | ast.Lambda)):
                yield child
                yield from outside_bodies(child)


def lists_of_methods(tree: ast.Module, tool: bool) -> list[str]:
    """Why a file lists methods, a new one of which would be missing from it; empty where it does not.

    One method is an example, and so is what a single test says in its body, or the two that it stacks. More of them that are
    imported, stand in constants or decorators, or are gone through by a loop are a list.
    """
    found = []
    constants = named([tree]) if tool else named(node for node in outside_bodies(tree) if isinstance(node, ast.Constant))
    modules = {slug for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for slug in _imported(node)}
    if len(constants) > 1:
        found.append(f"names {', '.join(sorted(constants))}")
    if len(modules) > (1 if tool else 2):
        found.append(f"imports {', '.join(sorted(modules))}")
    loops = [named([node.iter]) for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension)]
    return found + [f"goes through {', '.join(sorted(slugs))}" for slugs in loops if len(slugs) > 1]


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    parts = [f"{prefix}{alias.name}".split(".") for alias in node.names]
    return {name[1] for name in parts if name[0] == "methods" and len(name) > 1} & ENTRIES.keys()


def test_no_tool_and_no_shared_test_lists_methods():
    """A new method is found by its files: what a tool or a test needs to know of it stands in its module or its entry."""
    tools = [*files("tools"), *files("kernels"), *files("methods/_core"), *files("tests/contracts"),
             *files("tests", "conftest.py")]
    tests = [path for path in files("tests") if path not in tools and path.parent.name not in ("methods", "toys")]
    found = {path.relative_to(ROOT).as_posix(): reasons for group, tool in ((tools, True), (tests, False)) for path in group
             if (reasons := lists_of_methods(ast.parse(path.read_text()), tool))}
    assert not found


@pytest.mark.parametrize(("text", "tool", "test"), [
    ("from methods import tome", [], []), ("from methods import tome, fora", ["imports fora, tome"], []),
    ("from methods import tome, fora, toca", ["imports fora, toca, tome"], ["imports fora, toca, tome"]),
    ("import methods.tome\nfrom methods.fora import apply\nfrom methods import toca, _core", ["imports fora, toca, tome"],
     ["imports fora, toca, tome"]),
    ("KNOWN = ['tome', 'fora']", ["names fora, tome"], ["names fora, tome"]),
    ("KNOWN = {'tome': 1, 'fora': 2}", ["names fora, tome"], ["names fora, tome"]),
    ("X = 'tome fora'.split()", ["names fora, tome"], ["names fora, tome"]),
    ("X = ('tome', 'a tome of words', 'methods/tome.py')", [], []),
    ("@mark('a', ['tome', 'methods.fora'])\ndef test(): pass", ["names fora, tome"], ["names fora, tome"]),
    ("def test():\n    assert x['tome'] < x['fora']", ["names fora, tome"], []),
    ("def test():\n    for slug in ('tome', 'fora'): pass", ["names fora, tome", "goes through fora, tome"],
     ["goes through fora, tome"]),
    ("def test():\n    return [f(x) for x in ['tome', 'fora']]", ["names fora, tome", "goes through fora, tome"],
     ["goes through fora, tome"]),
    ("class A:\n    known = 'tome', 'fora'", ["names fora, tome"], ["names fora, tome"]),
    ("def test(a='tome', b='fora'): pass", ["names fora, tome"], ["names fora, tome"])])
def test_what_counts_as_a_list_of_methods(text, tool, test):
    assert lists_of_methods(ast.parse(text), True) == tool and lists_of_methods(ast.parse(text), False) == test


@pytest.mark.slow
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
