"""The catalogue as data: entries, lists and vocabulary, and the line on which each of their keys stands."""
from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from accel_tools.catalog.schema import Axis, Entry, ListSpec, Row, Section, Vocab
from accel_tools.catalog.yaml_lines import Problem, line_of

ROOT = Path(__file__).resolve().parents[2]


def entry_file(slug: str) -> str:
    return f"catalog/entries/{slug}.yaml"


def allowed(word: str, allowed: list[str]) -> str:
    """What to write in place of `word`: the closest allowed one, or all of them."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(sorted(allowed)) or 'none'}"


class CatalogError(Exception):
    """All problems of a catalogue, in the order of files and lines."""

    def __init__(self, problems: list[Problem]):
        self.problems = sorted(problems)
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True)
class Catalog:
    root: Path
    vocab: Vocab
    lists: dict[str, ListSpec]
    entries: dict[str, Entry]                                     # by slug, sorted
    lines: dict[str, dict] = field(default_factory=dict)          # file -> key path -> line

    def line(self, slug: str, *path: str | int) -> int:
        return line_of(self.lines.get(entry_file(slug), {}), path)

    def rows(self, list_name: str, section: str) -> list[tuple[Entry, Row]]:
        """Rows of one section by rank, from the last one on in a list that is newest first."""
        place = f"{list_name}/{section}"
        found = [(entry, row) for entry in self.entries.values() for row in entry.rows if row.place == place]
        return sorted(found, key=lambda pair: pair[1].rank, reverse=self.lists[list_name].unlisted)


def with_unlisted(vocab: Vocab, lists: dict[str, ListSpec], entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries, where those without a row have one in each unlisted list; ranks of a section run by date of publication."""
    rows: dict[str, list[Row]] = {slug: [] for slug, entry in entries.items() if not entry.rows}
    by_date = sorted(rows, key=lambda slug: (entries[slug].since, slug))
    for name, spec in lists.items():
        ranks = dict.fromkeys((section.id for section in spec.sections), 0)
        for slug in by_date if spec.unlisted else ():
            for section in spec.sections:
                if _takes(section, entries[slug], vocab.mechanism):
                    ranks[section.id] += 1
                    rows[slug].append(Row.model_validate({"in": f"{name}/{section.id}", "rank": ranks[section.id]}))
                    break
    return {slug: entry.model_copy(update={"rows": rows[slug]}) if rows.get(slug) else entry for slug, entry in entries.items()}


def _takes(section: Section, entry: Entry, axis: Axis) -> bool:
    terms = {*entry.tags.mechanism, *(axis.terms[term].parent for term in entry.tags.mechanism if term in axis.terms)}
    return entry.since >= (section.since or "") and (not section.mechanism or not terms.isdisjoint(section.mechanism))
