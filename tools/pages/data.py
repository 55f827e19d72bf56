"""The catalogue as data for others: JSON, CSV with one line a method, BibTeX; what was measured with one line a run."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import bibtexparser
from bibtexparser.model import Entry as BibEntry
from bibtexparser.model import Field
from pylatexenc.latexencode import UnicodeToLatexEncoder

from accel_tools.catalog import Catalog
from accel_tools.catalog.schema import TAG_AXES, Paper, Vocab
from accel_tools.pages.views import METRICS, reading

_latex = UnicodeToLatexEncoder(unknown_char_policy="keep", replacement_latex_protection="braces-all")


def as_json(catalog: Catalog) -> str:
    entries = [
        {"slug": slug, **entry.model_dump(mode="json", by_alias=True, exclude_none=True)}
        for slug, entry in catalog.entries.items()
    ]
    data = {"licence": "CC-BY-4.0", "vocab": catalog.vocab.model_dump(mode="json", exclude_none=True),
            "entries": entries}
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def as_csv(catalog: Catalog) -> str:
    columns = ["slug", "name", "kind", "since", "summary", "title", "authors", "venue", "year", "arxiv", "doi", "link",
               "code", "licence", "models", *TAG_AXES, "implemented"]
    rows = []
    for slug, entry in catalog.entries.items():
        paper = entry.papers[0]
        rows.append({
            "slug": slug, "name": entry.name, "kind": entry.kind, "since": entry.since, "summary": entry.summary,
            "title": paper.title, "authors": "; ".join(author.name for author in paper.authors),
            "venue": paper.venue, "year": paper.year, "arxiv": paper.arxiv, "doi": paper.doi, "link": paper.link,
            "code": paper.code_link, "licence": paper.licence, "models": " ".join(entry.models),
            **{axis: " ".join(getattr(entry.tags, axis)) for axis in TAG_AXES},
            "implemented": "no" if entry.pending else "yes",
        })
    return _csv(columns, rows)


def results_csv(tables: Iterable[Mapping[str, Any]]) -> str:
    """One line a measured run, of `views.table`s: plain sampling, fewer steps, methods and packages on every model."""
    rows = []
    for table in tables:
        for run in table["found"].runs:
            said = table["said"][id(run)]
            rows.append({
                "model": table["model"], "kind": run.kind, "name": run.name, "slug": run.slug,
                "config": json.dumps(dict(run.config)), "stale": "yes" if run.stale else "no",
                **{key: json.dumps(value) for key in METRICS if (value := reading(run, key)) is not None},
                "verdict": said and said.word, "why": said and said.why, "error": run.arm.get("error"),
            })
    return _csv(["model", "kind", "name", "slug", "config", "stale", *METRICS, "verdict", "why", "error"], rows)


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    table = csv.DictWriter(out, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()


def bib_entry(paper: Paper, vocab: Vocab) -> BibEntry:
    """One BibTeX entry in ASCII where LaTeX has a name for the character; titles keep their case."""
    text = {"title": f"{{{_latex.unicode_to_latex(paper.title)}}}", "author": _bib_authors(paper),
            "year": str(paper.year)}
    venue = _latex.unicode_to_latex(paper.venue)
    if paper.venue in ("arXiv", "GitHub", "OpenReview"):
        kind, text["howpublished"] = "misc", venue
    elif vocab.venue[paper.venue].journal:
        kind, text["journal"] = "article", venue
    else:
        kind, text["booktitle"] = "inproceedings", venue
    if paper.arxiv:
        text |= {"eprint": paper.arxiv, "archiveprefix": "arXiv"}
    if paper.doi:
        text["doi"] = paper.doi
    text["url"] = paper.link
    return BibEntry(kind, paper.key, [Field(key, value) for key, value in text.items()])


def _bib_authors(paper: Paper) -> str:
    names = []
    for author in paper.authors:
        family = _latex.unicode_to_latex(author.family)
        if not author.given:
            names.append(f"{{{family}}}")                         # one name: keep BibTeX from splitting it
        else:
            names.append(f"{family}, {_latex.unicode_to_latex(author.given)}")
    return " and ".join(names)


def as_bib(catalog: Catalog) -> str:
    library = bibtexparser.Library([bib_entry(p, catalog.vocab) for entry in catalog.entries.values() for p in entry.papers])
    return bibtexparser.write_string(library)
