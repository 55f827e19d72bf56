"""Rules of the catalogue that span fields or files."""
from __future__ import annotations

import ast
import builtins
import keyword
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from accel_tools.catalog.entries import Catalog, allowed, entry_file
from accel_tools.catalog.papers import paper_problems
from accel_tools.catalog.schema import SLUG, TAG_AXES, Axis, Claim, Kind
from accel_tools.catalog.yaml_lines import Problem, line_of


def slug_problem(slug: str, root: Path) -> str | None:
    """Why a method cannot have this name; None where it can."""
    if not SLUG.fullmatch(slug):
        return f"{slug!r} must be lower-case letters, digits and _, starting with a letter"
    if keyword.iskeyword(slug) or keyword.issoftkeyword(slug):
        return f"{slug!r} is a word of Python, so that `from methods import {slug}` cannot be written or misleads"
    if hasattr(builtins, slug):
        return f"{slug!r} is a builtin of Python, which `from methods import {slug}` would hide"
    if slug in sys.stdlib_module_names:
        return f"{slug!r} is a module of Python's library, which a file of that name hides where its folder is searched first"
    package = root / "methods/__init__.py"
    if slug in _bound(ast.parse(package.read_bytes()) if package.exists() else ast.Module([], [])):
        return f"{slug!r} is a name of the package `methods` already, which a module would hide"
    return None


def _bound(tree: ast.Module) -> set[str]:
    """The names that a module gives a value: by imports, definitions and assignments."""
    found = set()
    for node in tree.body:
        found |= {getattr(node, "name", ""), *((each.asname or each.name).split(".")[0] for each in getattr(node, "names", ()))}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    return found


def problems_of(catalog: Catalog, slugs: set[str], complete: bool) -> Iterator[Problem]:
    """Everything wrong with readable files. `complete`: every file was readable, so gaps can be told."""
    yield from _vocabulary_rules(catalog)
    yield from paper_problems(catalog)
    places: dict[tuple[str, int], tuple[str, int]] = {}
    sections = {f"{name}/{s.id}": s for name, spec in catalog.lists.items() for s in spec.sections}
    for slug, entry in catalog.entries.items():
        file = entry_file(slug)

        def at(*path, _slug=slug):
            return catalog.line(_slug, *path)

        if not entry.claims and not entry.pending:
            said = f"claims: a {entry.kind} must say what it saves, some of {', '.join(get_args(Claim))}"
            yield Problem(file, at("kind"), said)
        elif len(entry.claims) > 1 and ("none" in entry.claims or len(set(entry.claims)) < len(entry.claims)):
            yield Problem(file, at("claims"), "claims: each stands once, and none stands alone")
        for i, other in enumerate(entry.builds_on):
            if other not in slugs or other == slug:
                yield Problem(file, at("builds_on", i), f"builds_on.{i}: {other!r} is no other entry; "
                                                        + allowed(other, sorted(slugs - {slug})))
        for i, row in enumerate(entry.rows):
            line, spot = at("rows", i), (row.place, row.rank)
            if row.place not in sections:
                yield Problem(file, line, f"rows.{i}.in: no such section; {allowed(row.place, sorted(sections))}")
            elif catalog.lists[row.place.split("/")[0]].unlisted and ("rows", i) in catalog.lines.get(file, {}):
                yield Problem(file, line, f"rows.{i}.in: {row.place} takes what has no row by itself; leave this one out")
            elif spot in places:
                other, row_line = places[spot]
                yield Problem(file, line, f"rows.{i}: {row.place} already has number {row.rank} at {other}:{row_line}")
            else:
                places[spot] = (file, line)
        spots = {(row.place, row.rank) for row in entry.rows if row.place in sections}
        told = set()
        for i, erratum in enumerate(entry.errata):
            if (erratum.place, erratum.row) not in spots:
                message = f"errata.{i}: this entry has no row {erratum.row} in {erratum.place}"
                yield Problem(file, at("errata", i), message)
            elif erratum.row > sections[erratum.place].source_rows:
                message = f"errata.{i}: row {erratum.row} of {erratum.place} is none of its source's, which alone have errata"
                yield Problem(file, at("errata", i), message)
            if (mark := (erratum.place, erratum.row, erratum.field)) in told:
                yield Problem(file, at("errata", i), f"errata.{i}: {erratum.field} of this row is corrected twice")
            told.add(mark)
        if not entry.rows and (homes := [name for name, spec in catalog.lists.items() if spec.unlisted]):
            yield Problem(file, at("since"), f"no section of {' or '.join(homes)} takes this entry, which has no row")
    if complete:
        yield from _gaps(catalog, places)


def _gaps(catalog: Catalog, places: dict[tuple[str, int], tuple[str, int]]) -> Iterator[Problem]:
    """Numbers of a section run from 1 without a gap."""
    for name, spec in catalog.lists.items():
        for i, section in enumerate(spec.sections):
            ranks = {rank for place, rank in places if place == f"{name}/{section.id}"}
            file = f"catalog/lists/{name}.yaml"
            if missing := sorted(set(range(1, max(ranks, default=0) + 1)) - ranks):
                yield Problem(file, line_of(catalog.lines[file], ("sections", i)),
                              f"sections.{i}: no entry stands at {', '.join(map(str, missing))} of {name}/{section.id}")


def _vocabulary_rules(catalog: Catalog) -> Iterator[Problem]:
    vocab, file = catalog.vocab, "catalog/vocab.yaml"
    for name, axis in vocab:
        for term, facts in (axis.terms.items() if isinstance(axis, Axis) else ()):
            line = line_of(catalog.lines[file], (name, "terms", term))
            if facts.parent and facts.parent not in axis.terms:
                yield Problem(file, line, f"{name}.{term}.parent: {allowed(facts.parent, list(axis.terms))}")
            if axis.colour and not facts.badge:
                yield Problem(file, line, f"{name}.{term}: needs a badge text")
            if name == "kind" and not facts.verb:
                yield Problem(file, line, f"{name}.{term}: needs a verb")
    for name, spec in catalog.lists.items():
        for i, section in enumerate(spec.sections):
            for j, term in enumerate(section.mechanism):
                if term not in vocab.mechanism.terms:
                    where = f"catalog/lists/{name}.yaml"
                    yield Problem(where, line_of(catalog.lines[where], ("sections", i, "mechanism", j)),
                                  f"sections.{i}.mechanism: {allowed(term, list(vocab.mechanism.terms))}")
    if set(vocab.kind.terms) != set(get_args(Kind)):
        yield Problem(file, 1, f"kind: terms must be {', '.join(get_args(Kind))}")
    for slug, entry in catalog.entries.items():
        used = [("model", ("models",), entry.models)]
        used += [(axis, ("tags", axis), getattr(entry.tags, axis)) for axis in TAG_AXES]
        used += [(axis, ("rows", i, axis), getattr(row, axis) or [])
                 for i, row in enumerate(entry.rows) for axis in TAG_AXES]
        for axis, path, terms in used:
            known = getattr(vocab, axis).terms
            for j, term in enumerate(terms):
                where = ".".join(map(str, path))
                if term not in known:
                    yield Problem(entry_file(slug), catalog.line(slug, *path, j),
                                  f"{where}: {term!r} is no term of {axis}; {allowed(term, list(known))}")
                elif term in terms[:j]:
                    yield Problem(entry_file(slug), catalog.line(slug, *path, j), f"{where}: {term!r} stands twice")
