"""Rows of the awesome lists: what a list prints for an entry, and what its source printed there.

A row starts from the entry, takes the overrides of its `rows` item, and is printed in the corrected form. With
`as_seed=True` the errata are applied backwards, which gives the line of the source list.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from accel_tools.catalog.entries import Catalog, entry_file
from accel_tools.catalog.schema import TAG_AXES, Entry, ListSpec, Paper, Row
from accel_tools.catalog.yaml_lines import Problem, line_of

SOURCE = "xuyang-liu16/Awesome-Generation-Acceleration"
Value = str | list[str] | None


@dataclass(frozen=True)
class Line:
    """One printed row, escaped for Markdown."""
    rank: int
    title: str
    venue: str
    authors: str | None
    paper: str
    code: str | None
    badges: list[str]                 # "Token_Merging-orange"


def markdown(text: str) -> str:
    """Plain text as Markdown that shows exactly that text, in a paragraph or in a table cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def link(url: str) -> str:
    """A URL that cannot end a Markdown link early."""
    return re.sub(r"[()<>|\s\\\"`]", lambda m: "".join(f"%{byte:02X}" for byte in m[0].encode()), url)


def shield(text: str) -> str:
    """Badge text for a shields URL: `_` is a space there, a hyphen is doubled, reserved characters are encoded."""
    text = text.replace("-", "--").replace(" ", "_")
    return re.sub(r"[%?#&<>\"'()\[\]\\^{|}`]", lambda m: f"%{ord(m[0]):02X}", text)


def badge_of(name: str) -> str:
    """Badge text of a method name, in the form of the source lists: space and hyphen both become `_`."""
    return name.replace("_", "__").replace("-", "_").replace(" ", "_")


def authors_line(paper: Paper, style: str) -> str:
    if style == "last_first":
        return " and ".join(f"{a.family}, {a.given}" if a.given else a.family for a in paper.authors)
    return (", " if style == "commas" else " and ").join(a.name for a in paper.authors)


def fields(catalog: Catalog, spec: ListSpec, entry: Entry, row: Row) -> dict[str, Value]:
    """The printed values as plain text, before escaping; tag axes as badge texts. `badges` follows from the rest."""
    paper = entry.papers[0]
    url = paper.link
    if paper.arxiv and spec.link == "pdf":
        url = url.replace("/abs/", "/pdf/")
    values: dict[str, Value] = {
        "badge": badge_of(entry.name),
        "title": paper.title,
        "venue": f"{paper.venue} {paper.year}",
        "authors": authors_line(paper, row.authors_style),
        "paper": url,
        "code": paper.code_link,
        **{axis: getattr(entry.tags, axis) for axis in TAG_AXES},
    }
    values |= {key: getattr(row, key) for key in row.model_fields_set & values.keys()}
    for axis in TAG_AXES:
        terms = values[axis] or [] if axis in spec.axes else []
        values[axis] = [catalog.vocab.term(axis, term).badge for term in terms]
    values["badges"] = _badges(catalog, values)
    return values


def _badges(catalog: Catalog, values: dict[str, Value]) -> list[str]:
    badges = [f"{shield(values['badge'])}-{catalog.vocab.method.colour}"] if values["badge"] else []
    for axis in TAG_AXES:
        badges += [f"{shield(text)}-{getattr(catalog.vocab, axis).colour}" for text in values[axis]]
    return badges


def printed(catalog: Catalog, spec: ListSpec, entry: Entry, row: Row, as_seed: bool = False) -> Line:
    values = fields(catalog, spec, entry, row)
    shown = {key: markdown(values[key]) if values[key] else None for key in ("title", "venue", "authors")}
    shown |= {key: link(values[key]) if values[key] else None for key in ("paper", "code")}
    if as_seed:
        wrong = {e.field: e.seed for e in entry.errata if (e.place, e.row) == (row.place, row.rank)}
        wrong.pop("placement", None)
        values |= {axis: wrong[axis] or [] for axis in TAG_AXES if axis in wrong}
        values["badge"] = wrong.get("badge", values["badge"])
        values["badges"] = wrong.get("badges", _badges(catalog, values))
        shown |= {key: wrong[key] for key in shown.keys() & wrong.keys()}
    return Line(rank=row.rank, badges=values["badges"], **shown)


def erratum_problems(catalog: Catalog) -> Iterator[Problem]:
    """An erratum must name what its row prints now, and it must change something."""
    for slug, entry in catalog.entries.items():
        rows = {(row.place, row.rank): row for row in entry.rows}
        for i, erratum in enumerate(entry.errata):
            if erratum.field == "placement":
                continue
            row = rows[erratum.place, erratum.row]
            now = fields(catalog, catalog.lists[row.place.split("/")[0]], entry, row)[erratum.field]
            line = catalog.line(slug, "errata", i)
            if (erratum.corrected or None) != (now or None):
                yield Problem(entry_file(slug), line, f"errata.{i}: {erratum.field} is printed as {now!r}, "
                                                      f"not as {erratum.corrected!r}")
            elif (erratum.seed or None) == (now or None):
                yield Problem(entry_file(slug), line, f"errata.{i}: {erratum.field} is the same in both lists")
    for name, spec in catalog.lists.items():
        file = f"catalog/lists/{name}.yaml"
        text = spec.header + "".join(section.text for section in spec.sections)
        for i, erratum in enumerate(spec.errata):
            if erratum.corrected not in text:
                yield Problem(file, line_of(catalog.lines[file], ("errata", i)),
                              f"errata.{i}: {erratum.corrected!r} stands nowhere in this list")
