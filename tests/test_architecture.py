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


def at_import(body: list[ast.stmt]):
    """The expressions and statements that are evaluated when a module is imported, one by one: no bodies of functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield from (*node.decorator_list, node.args)
        elif isinstance(node, ast.ClassDef):
            yield from at_import(node.body)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def lists_of_methods(tree: ast.Module, tool: bool) -> list[str]:
    """Why a file lists methods, a new one of which would be missing from it; empty where it does not.

    A tool may name one, as an example. A test may say in its body what it likes; but no constant and no decorator may name
    more than one, or two modules, which is a pair; and no loop may go through more.
    """
    imported = {slug for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for slug in _imported(node)}
    if tool:
        found = [(f"{what} {', '.join(sorted(slugs))}", len(slugs) > 1)
                 for what, slugs in (("names", named([tree])), ("imports", imported))]
    else:
        loops = [node.iter for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension)]
        found = []
        for node in (*at_import(tree.body), *loops):
            modules = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & imported
            slugs = named([node])
            found.append((f"line {getattr(node, 'lineno', 1)}: {', '.join(sorted(slugs | modules))}",
                          len(slugs) > 1 or len(slugs | modules) > 2))
    return [reason for reason, wrong in found if wrong]


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


TWO, THREE = "fora, tome", "fora, toca, tome"


@pytest.mark.parametrize(("text", "tool", "test"), [
    ("from methods import tome", [], []), ("from methods import tome, fora", [f"imports {TWO}"], []),
    ("import methods.tome\nfrom methods.fora import apply\nfrom methods import toca, _core", [f"imports {THREE}"], []),
    ("KNOWN = ['tome', 'fora']", [f"names {TWO}"], [f"line 1: {TWO}"]),
    ("KNOWN = {'tome': 1, 'fora': 2}", [f"names {TWO}"], [f"line 1: {TWO}"]),
    ("X = 'tome fora'.split()", [f"names {TWO}"], [f"line 1: {TWO}"]),
    ("X = ('tome', 'a tome of words', 'methods/tome.py')", [], []),
    ("@mark('a', ['tome', 'methods.fora'])\ndef test(): pass", [f"names {TWO}"], [f"line 1: {TWO}"]),
    ("from methods import tome, fora\n@mark('a', [tome, fora])\ndef test(): pass", [f"imports {TWO}"], []),
    ("from methods import tome, fora, toca\n@mark('a', [tome, fora, toca])\ndef test(): pass", [f"imports {THREE}"],
     [f"line 2: {THREE}"]),
    ("def test():\n    assert x['tome'] < x['fora']", [f"names {TWO}"], []),
    ("def test():\n    for slug in ('tome', 'fora'): pass", [f"names {TWO}"], [f"line 2: {TWO}"]),
    ("def test():\n    return [f(x) for x in ['tome', 'fora']]", [f"names {TWO}"], [f"line 2: {TWO}"]),
    ("class A:\n    known = 'tome', 'fora'", [f"names {TWO}"], [f"line 2: {TWO}"]),
    ("def test(a='tome', b='fora'): pass", [f"names {TWO}"], [f"line 1: {TWO}"])])
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
