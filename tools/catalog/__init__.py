"""The catalogue: a loader that reads every file and reports every error at once.

    catalog = load()                     # raises CatalogError with all problems
    catalog.entries["tome"].papers[0].title
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from accel_tools.catalog.entries import ROOT, Catalog, CatalogError, allowed, with_unlisted
from accel_tools.catalog.rules import problems_of, slug_problem
from accel_tools.catalog.schema import UNFILLED, Entry, ListSpec, Strict, Vocab
from accel_tools.catalog.yaml_lines import Problem, line_of, parse


@dataclass(frozen=True)
class Reading:
    """What could be read of a catalogue, and what is wrong with it.

    `catalog` holds the sound entries; None where vocabulary or lists are broken. `drafts` are entries with problems of which
    at least name, kind and papers are sound; what else is missing in them is made up.
    """

    catalog: Catalog | None
    problems: list[Problem]
    slugs: set[str]                   # of all files, readable or not
    drafts: dict[str, Entry]


MADE_UP = {"summary": "-", "since": "2000-01", "models": ["a"], "mechanism": "-", "builds_on": [], "bench": {}, "claims": [],
           "tags": {"application": ["a"], "training": ["a"], "mechanism": ["a"]}, "rows": [], "reported": [], "fidelity": None,
           "errata": [], "notes": None}


def load(root: Path = ROOT) -> Catalog:
    """Reads and checks the whole catalogue below `root`. Raises CatalogError with every problem found."""
    reading = read(root)
    if reading.catalog is None or reading.problems:
        raise CatalogError(reading.problems)
    return reading.catalog


def read(root: Path = ROOT) -> Reading:
    """As much of the catalogue below `root` as can be read, with every problem found."""
    problems: list[Problem] = []
    lines: dict[str, dict] = {}

    def read_file(path: Path, model: type[Strict]) -> tuple[Strict | None, Any]:
        """The file as `model`, None if there is a problem, and as plain data."""
        file = path.relative_to(root).as_posix()
        try:
            source = path.read_bytes()
        except OSError as error:
            problems.append(Problem(file, 1, f"cannot be read: {error.strerror}"))
            return None, None
        data, lines[file], found = parse(source, file)
        problems.extend(found)
        if found:
            return None, None
        if not isinstance(data, dict):
            problems.append(Problem(file, 1, "must be a mapping of keys to values"))
            return None, None
        unfilled = list(_unfilled(data))
        problems.extend(Problem(file, line_of(lines[file], at), f"{at[0]}: fill in{text}") for at, text in unfilled)
        try:
            whole = model.model_validate(data)
            return None if unfilled else whole, data
        except ValidationError as error:
            filled = [e for e in error.errors() if not str(e["input"]).startswith(UNFILLED)]
            problems.extend(Problem(file, line_of(lines[file], e["loc"]), _explain(e, model)) for e in filled)
            return None, data

    vocab, _ = read_file(root / "catalog/vocab.yaml", Vocab)
    lists = {path.stem: read_file(path, ListSpec)[0] for path in sorted((root / "catalog/lists").glob("*.yaml"))}
    lists = dict(sorted(lists.items(), key=lambda item: bool(item[1] and item[1].unlisted)))      # those of a source first
    entries, drafts, slugs = {}, {}, set()
    for path in sorted((root / "catalog/entries").glob("*")):
        file = path.relative_to(root).as_posix()
        reason = slug_problem(path.stem, root)
        if path.suffix != ".yaml" or reason:
            problems.append(Problem(file, 1, "file name must be <slug>.yaml" + (f"; {reason}" if reason else "")))
            continue
        slugs.add(path.stem)
        entry, data = read_file(path, Entry)
        if entry:
            entries[path.stem] = entry
        elif sketch := draft(data):
            drafts[path.stem] = sketch
    for slug, entry in [*entries.items(), *drafts.items()]:
        entry._slug = slug
    catalog = None
    if vocab and all(lists.values()):
        catalog = Catalog(root, vocab, lists, with_unlisted(vocab, lists, entries), lines)
        problems.extend(problems_of(catalog, slugs, complete=not problems))
    return Reading(catalog, sorted(problems), slugs, drafts)


def draft(data: Any) -> Entry | None:
    """An entry whose name, kind and papers are sound, the rest made up where it is not."""
    if not isinstance(data, dict):
        return None
    known = {key: value for key, value in data.items() if key in ("name", "kind", "pending", "papers")}
    kept = {key: value for key, value in data.items() if key in ("builds_on", "bench") and not list(_unfilled(value))}
    for facts in (kept, {}):
        try:
            return Entry.model_validate(MADE_UP | known | facts)
        except ValidationError:
            continue
    return None


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
