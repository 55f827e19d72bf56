"""The catalogue: a loader that reads every file and reports every error at once.

    catalog = load()                     # raises CatalogError with all problems
    catalog.entries["tome"].papers[0].title
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from accel_tools.catalog.entries import ROOT, Catalog, CatalogError
from accel_tools.catalog.rules import allowed, problems_of
from accel_tools.catalog.schema import SLUG, UNFILLED, Entry, ListSpec, Strict, Vocab
from accel_tools.catalog.yaml_lines import Problem, line_of, parse


def load(root: Path = ROOT) -> Catalog:
    """Reads and checks the whole catalogue below `root`. Raises CatalogError with every problem found."""
    problems: list[Problem] = []
    lines: dict[str, dict] = {}

    def read(path: Path, model: type[Strict]):
        file = path.relative_to(root).as_posix()
        try:
            source = path.read_bytes()
        except OSError as error:
            problems.append(Problem(file, 1, f"cannot be read: {error.strerror}"))
            return None
        data, lines[file], found = parse(source, file)
        problems.extend(found)
        if found:
            return None
        if not isinstance(data, dict):
            problems.append(Problem(file, 1, "must be a mapping of keys to values"))
            return None
        unfilled = list(_unfilled(data))
        problems.extend(Problem(file, line_of(lines[file], at), f"{at[0]}: fill in{text}") for at, text in unfilled)
        try:
            entry = model.model_validate(data)
            return None if unfilled else entry
        except ValidationError as error:
            filled = [e for e in error.errors() if not str(e["input"]).startswith(UNFILLED)]
            problems.extend(Problem(file, line_of(lines[file], e["loc"]), _explain(e, model)) for e in filled)
            return None

    vocab = read(root / "catalog/vocab.yaml", Vocab)
    lists = {path.stem: read(path, ListSpec) for path in sorted((root / "catalog/lists").glob("*.yaml"))}
    entries = {}
    for path in sorted((root / "catalog/entries").glob("*")):
        file = path.relative_to(root).as_posix()
        if path.suffix != ".yaml" or not SLUG.fullmatch(path.stem):
            problems.append(Problem(file, 1, "file name must be <slug>.yaml, the slug in lower case, digits and _"))
            continue
        if entry := read(path, Entry):
            entry._slug = path.stem
            entries[path.stem] = entry
    slugs = {path.stem for path in (root / "catalog/entries").glob("*.yaml")}
    if vocab and all(lists.values()):
        catalog = Catalog(root, vocab, lists, entries, lines)
        problems.extend(problems_of(catalog, slugs, complete=not problems))
        if not problems:
            return catalog
    raise CatalogError(problems)


def _unfilled(data: object, path: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """Key paths whose text is still a request of tools/new_entry.py, with that request."""
    if isinstance(data, str) and data.startswith(UNFILLED):
        yield path, data.removeprefix(UNFILLED[:-1])
    elif isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _unfilled(value, (*path, key))


def _explain(error: dict, model: type[Strict]) -> str:
    """A pydantic error in words: where, what is wrong, what is allowed."""
    path, value = error["loc"], error.get("input")
    where = ".".join(str(part) for part in path if not re.search(r"[\[(]|^str$", str(part)))
    if error["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        known = [f.alias or name for name, f in owner.model_fields.items()] if owner else []
        return f"{where}: unknown key; {allowed(str(path[-1]), known)}" if known else f"{where}: unknown key"
    if error["type"] == "missing":
        return f"{where}: missing key"
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return f"{where}: {message}; got {shown if len(shown) < 100 else shown[:97] + '...'}"


def _model_at(model: type[Strict], path: tuple) -> type[Strict] | None:
    """The model that `path` leads to, found through the annotations."""
    for part in path:
        if isinstance(part, int) or part == "[key]":
            continue
        known = {f.alias or name: f.annotation for name, f in model.model_fields.items()}
        if part not in known:
            continue
        stack, found = [known[part]], None
        while stack and found is None:
            kind = stack.pop()
            if isinstance(kind, type) and issubclass(kind, Strict):
                found = kind
            stack.extend(get_args(kind))
        if found is None:
            return None
        model = found
    return model
