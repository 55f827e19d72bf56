"""Rules that tie methods, tests and kernels to their entries. Source is read by AST; nothing is imported."""
from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from accel_tools.catalog import Reading
from accel_tools.catalog.code_hash import Code
from accel_tools.catalog.entries import Catalog, allowed, entry_file
from accel_tools.catalog.module_rules import config_fields, file_problems, module_problems, problems_of_test, syntax_problem
from accel_tools.catalog.schema import Entry
from accel_tools.catalog.source import Source
from accel_tools.catalog.yaml_lines import Problem


def code_problems(reading: Reading) -> Iterator[Problem]:
    """Everything wrong with modules and tests, also of methods whose entry is not finished."""
    catalog = reading.catalog
    if catalog is None:
        return
    source = Source(catalog.root)
    modules = _slugs(catalog.root, "methods", r"([a-z]\w*)")
    tests = _slugs(catalog.root, "tests/methods", r"test_([a-z]\w*)")
    for slug in sorted(modules.keys() | tests.keys() | reading.slugs):
        entry, module, test = catalog.entries.get(slug) or reading.drafts.get(slug), modules.get(slug), tests.get(slug)
        if slug not in reading.slugs:
            yield Problem(module or test, 1, f"there is no {entry_file(slug)}")
        elif entry and entry.pending and module:
            yield Problem(entry_file(slug), catalog.line(slug, "pending"), f"pending: remove this key, {module} exists")
        elif entry and not entry.pending and not module:
            yield Problem(entry_file(slug), 1, f"methods/{slug}.py is missing; write it, or set pending: true")
        if module and not test:
            yield Problem(module, 1, f"tests/methods/test_{slug}.py is missing")
        if test and not module:
            yield Problem(test, 1, f"methods/{slug}.py is missing")
        if module:
            yield from _method_problems(catalog, source, slug, entry, catalog.root / module)
        if test:
            yield from problems_of_test(source, slug, entry and entry.kind, catalog.root / test)
    yield from _stale_results(reading, source)


def _method_problems(catalog: Catalog, source: Source, slug: str, entry: Entry | None, path: Path) -> Iterator[Problem]:
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    if broken := list(filter(None, (syntax_problem(source, part) for part in files))):
        yield from broken
        return
    yield from module_problems(catalog, source, slug, entry, path)
    if entry:
        fields = {field for part in files for field in config_fields(source.tree(part))}
        yield from _bench_problems(catalog, source, entry, fields)
    for part in files:
        yield from file_problems(source, slug, entry and entry.kind, part)


def _slugs(root: Path, folder: str, pattern: str) -> dict[str, str]:
    """Slug -> path from the root, for modules and for packages with an __init__.py."""
    found = {}
    for path in sorted((root / folder).glob("*")):
        file = path / "__init__.py" if path.is_dir() else path
        if (match := re.fullmatch(pattern, path.stem)) and file.suffix == ".py" and file.is_file():
            found[match[1]] = file.relative_to(root).as_posix()
    return found


def _bench_problems(catalog: Catalog, source: Source, entry: Entry, fields: set[str]) -> Iterator[Problem]:
    """What is to be measured names models that are there, packages that are, and fields of Config."""
    def wrong(word: str, known: list[str] | None, what: str, *at: str | int) -> Iterator[Problem]:
        if known is not None and word not in known:
            yield Problem(entry_file(entry.slug), catalog.line(entry.slug, *at), f"{'.'.join(map(str, at[:-1]))}: {what} "
                                                                                 f"{word!r}; {allowed(word, sorted(known))}")

    def keys(file: str, name: str) -> list[str] | None:
        path = catalog.root / "tools/measure" / file
        return _keys(source.tree(path), name) if path.is_file() else None

    for model, configs in entry.bench.items():
        yield from wrong(model, keys("tasks.py", "TASKS"), "no bundled model", "bench", model)
        for i, config in enumerate(configs):
            for name in config:
                yield from wrong(name, list(fields), "Config has no field", "bench", model, i, name)
    for i, run in enumerate(entry.timing):
        yield from wrong(run.model, keys("realistic.py", "MODELS"), "no model of real size", "timing", i, "model")
        if run.peer:
            yield from wrong(run.peer, keys("peers.py", "PEERS"), "no package", "timing", i, "peer")
        for name in run.config:
            yield from wrong(name, list(fields), "Config has no field", "timing", i, "config", name)


def _keys(tree: ast.Module, name: str) -> list[str]:
    """Keys of the mapping that is written out under `name`."""
    made = next(node.value for node in tree.body if isinstance(node, ast.AnnAssign | ast.Assign)
                and ast.unparse(getattr(node, "target", None) or node.targets[0]) == name)
    return [key.value for key in made.keys]


def _stale_results(reading: Reading, source: Source) -> Iterator[Problem]:
    catalog, code = reading.catalog, Code(source)
    for path in sorted((catalog.root / "catalog/results").glob("*.json")):
        file = path.relative_to(catalog.root).as_posix()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            yield Problem(file, 1, f"is no JSON: {error}")
            continue
        if path.stem not in reading.slugs:
            yield Problem(file, 1, f"there is no {entry_file(path.stem)}")
        if path.stem not in catalog.entries:                                    # or there is one that is not sound
            continue
        try:
            now = code.hash(path.stem)
        except (FileNotFoundError, SyntaxError):
            now = None
        if any(value != now for value in _values(data, "code_hash")):
            yield Problem(file, 1, "measured with other code than today's; run tools/bench.py again", "warning")
        elif any(value.endswith("-dirty") for value in _values(data, "commit")):
            yield Problem(file, 1, "measured from a tree that was not committed; run tools/bench.py again", "warning")


def _values(data: object, key: str) -> list[str]:
    """All values under `key`, at any depth."""
    if isinstance(data, list):
        return [found for item in data for found in _values(item, key)]
    if isinstance(data, dict):
        own = [data[key]] if key in data else []
        return own + [found for item in data.values() for found in _values(item, key)]
    return []
