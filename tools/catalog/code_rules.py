"""Rules that tie methods, tests and kernels to their entries. Source is read by AST; nothing is imported."""
from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from accel_tools.catalog.code_hash import Code
from accel_tools.catalog.entries import Catalog, entry_file
from accel_tools.catalog.rules import allowed
from accel_tools.catalog.schema import UNFILLED, Entry, Paper
from accel_tools.catalog.source import Source
from accel_tools.catalog.yaml_lines import Problem


def code_problems(catalog: Catalog) -> Iterator[Problem]:
    source = Source(catalog.root)
    modules = _slugs(catalog.root, "methods", r"([a-z]\w*)")
    tests = _slugs(catalog.root, "tests/methods", r"test_([a-z]\w*)")
    for slug in sorted(modules.keys() | tests.keys() | catalog.entries.keys()):
        entry, module = catalog.entries.get(slug), modules.get(slug)
        if entry is None:
            there = module or tests[slug]
            yield Problem(there, 1, f"there is no {entry_file(slug)}")
        elif entry.pending and module:
            yield Problem(entry_file(slug), catalog.line(slug, "pending"),
                          f"pending: remove this key, {module} exists")
        elif not entry.pending and not module:
            yield Problem(entry_file(slug), 1, f"methods/{slug}.py is missing; write it, or set pending: true")
        if module and slug not in tests:
            yield Problem(module, 1, f"tests/methods/test_{slug}.py is missing")
        if slug in tests and not module:
            yield Problem(tests[slug], 1, f"methods/{slug}.py is missing")
        if entry and module:
            yield from _module_problems(catalog, source, entry, module)
        if slug in tests:
            yield from _unfilled(tests[slug], catalog.root / tests[slug])
    yield from _stale_results(catalog, source)


def _slugs(root: Path, folder: str, pattern: str) -> dict[str, str]:
    """Slug -> path from the root, for modules and for packages with an __init__.py."""
    found = {}
    for path in sorted((root / folder).glob("*")):
        file = path / "__init__.py" if path.is_dir() else path
        if (match := re.fullmatch(pattern, path.stem)) and file.suffix == ".py" and file.is_file():
            found[match[1]] = file.relative_to(root).as_posix()
    return found


def _module_problems(catalog: Catalog, source: Source, entry: Entry, file: str) -> Iterator[Problem]:
    path = catalog.root / file
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    for part in files:
        try:
            source.tree(part)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            yield Problem(part.relative_to(catalog.root).as_posix(), line, f"does not parse: {error}")
            return
    tree = source.tree(path)
    yield from _docstring_problems(entry, file, ast.get_docstring(tree) or "")
    names = _public_names(tree)
    needed = ["Config", catalog.vocab.kind.terms[entry.kind].verb] + (["OFF"] if entry.kind == "patch" else [])
    for name in needed:
        if name not in names:
            yield Problem(file, 1, f"a method of kind {entry.kind} must define {name!r}")
    yield from _bench_problems(catalog, source, entry, {field for part in files for field in _config_fields(source.tree(part))})
    for part in files:
        name = part.relative_to(catalog.root).as_posix()
        yield from _unfilled(name, part)
        yield from _config_problems(name, source.tree(part), part)
        yield from _import_problems(catalog, source, entry, name, part)


def _unfilled(file: str, path: Path) -> Iterator[Problem]:
    """Places that tools/new_entry.py left to be written."""
    for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if UNFILLED in line:
            yield Problem(file, i, "fill in" + line.split(UNFILLED[:-1])[1].rstrip(' "\')'))


def docstring_parts(name: str, paper: Paper) -> tuple[str, str, str]:
    """First line, authors, and the rest of the second paragraph of a method's docstring."""
    places = (("arXiv", paper.arxiv), ("OpenReview", paper.openreview), ("doi", paper.doi))
    where = next((f" {label}:{value}." for label, value in places if value), f" {paper.url}.")
    code = f" Code: {paper.code}" if paper.code else ""
    authors = ", ".join(author.name for author in paper.authors)
    return f"{name} - {paper.title}", authors, f"{paper.venue} {paper.year}.{where}{code}".rstrip(".")


def _docstring_problems(entry: Entry, file: str, docstring: str) -> Iterator[Problem]:
    paragraphs = [" ".join(text.split()) for text in re.split(r"\n\s*\n", docstring)] + ["", ""]
    wanted = [docstring_parts(entry.name, paper) for paper in entry.papers]
    first = [head for head, _, _ in wanted]
    first += [head.replace(f"- {entry.name}: ", "- ", 1) for head in first]       # the name need not stand twice
    if paragraphs[0].rstrip(".") not in [head.rstrip(".") for head in first]:
        yield Problem(file, 1, f"docstring must begin with {first[0]!r}, as in {entry_file(entry.slug)}")
    second = [f"{shown}, {rest}" for _, authors, rest in wanted
              for shown in (authors, f"{authors.split(', ')[0]} et al.")]
    if paragraphs[1].rstrip(".") not in second:
        yield Problem(file, 1, f"second paragraph of the docstring must be {second[0]!r}; the author list may be "
                               "cut to 'First Author et al.'")


def _public_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def _config_problems(file: str, tree: ast.Module, path: Path) -> Iterator[Problem]:
    """Every field of Config says in a comment what it is and where the paper has it."""
    config = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    if config is None:
        return
    lines = path.read_text(encoding="utf-8").splitlines()[config.lineno - 1 : config.end_lineno]
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT and token.string.strip("# ")}
    for node in config.body:
        first, last = node.lineno - config.lineno + 1, node.end_lineno - config.lineno + 1
        above = {first - 1} if lines[first - 2].lstrip().startswith("#") else set()
        if isinstance(node, ast.AnnAssign) and not comments & {*range(first, last + 1), *above}:
            yield Problem(file, node.lineno, f"Config.{node.target.id} needs a comment: symbol, where in the paper")


def _config_fields(tree: ast.Module) -> list[str]:
    config = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    return [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)] if config else []


def _bench_problems(catalog: Catalog, source: Source, entry: Entry, fields: set[str]) -> Iterator[Problem]:
    """What is to be measured names bundled models and fields of Config."""
    tasks = catalog.root / "tools/measure/tasks.py"
    models = _keys(source.tree(tasks), "TASKS") if tasks.is_file() else entry.bench.keys()
    for model, configs in entry.bench.items():
        if model not in models:
            yield Problem(entry_file(entry.slug), catalog.line(entry.slug, "bench", model),
                          f"bench.{model}: no bundled model; {allowed(model, sorted(models))}")
        for i, config in enumerate(configs):
            for name in config.keys() - fields:
                yield Problem(entry_file(entry.slug), catalog.line(entry.slug, "bench", model, i, name),
                              f"bench.{model}.{i}: Config has no field {name!r}; {allowed(name, sorted(fields))}")


def _keys(tree: ast.Module, name: str) -> list[str]:
    """Keys of the mapping that is written out under `name`."""
    made = next(node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == name)
    return [key.value for key in made.keys]


def _import_problems(catalog: Catalog, source: Source, entry: Entry, file: str, path: Path) -> Iterator[Problem]:
    for module in source.imports(path):
        head, _, rest = module.partition(".")
        name = rest.split(".")[0]
        if head == "methods" and name in catalog.entries and name not in (entry.slug, *entry.builds_on):
            yield Problem(file, 1, f"imports methods.{name}; {entry_file(entry.slug)} must list it under builds_on")
        if head == "accel_kernels" and name and not name.startswith("_"):
            for needed in (f"kernels/{name}.py", f"kernels/_triton/{name}.py", f"tests/kernels/test_{name}.py"):
                if not (catalog.root / needed).is_file():
                    yield Problem(file, 1, f"imports the kernel {name!r}, but {needed} is missing")


def _stale_results(catalog: Catalog, source: Source) -> Iterator[Problem]:
    code = Code(source)
    for path in sorted((catalog.root / "catalog/results").glob("*.json")):
        file = path.relative_to(catalog.root).as_posix()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            yield Problem(file, 1, f"is no JSON: {error}")
            continue
        if path.stem not in catalog.entries:
            yield Problem(file, 1, f"there is no {entry_file(path.stem)}")
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
