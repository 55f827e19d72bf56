"""The exports hold every entry and read back with the usual programs."""
import csv
import json
import logging

import bibtexparser
import pytest
from bibtexparser.middlewares import LatexDecodingMiddleware, SeparateCoAuthors, SplitNameParts
from hypothesis import given
from hypothesis import strategies as st

from accel_tools import export
from accel_tools.catalog import load
from accel_tools.catalog.schema import Author, Paper
from accel_tools.pages.data import bib_entry

VOCAB = load().vocab
DECODE = [LatexDecodingMiddleware(), SeparateCoAuthors(), SplitNameParts()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    assert export.main(["--out", str(out)]) == 0
    return out


def test_json_holds_every_fact(folder):
    data = json.loads((folder / "catalog.json").read_text())
    catalog = load()
    assert [entry["slug"] for entry in data["entries"]] == list(catalog.entries)
    tome = next(entry for entry in data["entries"] if entry["slug"] == "tome")
    assert tome["papers"][0]["arxiv"] == "2303.17604" and tome["rows"][0]["in"] == "token-wise/image"


def test_csv_has_one_line_per_method(folder):
    with open(folder / "catalog.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    catalog = load()
    assert [row["slug"] for row in rows] == list(catalog.entries)
    tome = next(row for row in rows if row["slug"] == "tome")
    assert tome["authors"] == "Daniel Bolya; Judy Hoffman" and tome["code"] == "https://github.com/dbolya/tomesd"


def test_bibtex_reads_back(folder, caplog):
    caplog.set_level(logging.WARNING)
    text = (folder / "catalog.bib").read_text()
    library = bibtexparser.parse_string(text, append_middleware=DECODE)
    assert library.failed_blocks == [] and not caplog.records
    papers = {paper.key: paper for entry in load().entries.values() for paper in entry.papers}
    assert library.entries_dict.keys() == papers.keys()
    for key, paper in papers.items():
        names = [name.merge_first_name_first for name in library.entries_dict[key]["author"]]
        assert names == [author.name for author in paper.authors]


def test_bibtex_is_ascii_but_for_symbols_latex_lacks(folder):
    text = (folder / "catalog.bib").read_text()
    assert r"J{\"u}rgen" in text and r"W{\'o}jcik" in text
    assert text.isascii()


@given(st.text("ab &%$#_{}~^\\\"'<>@,=\u00fc\u0394\u00b3", min_size=1).map(lambda t: " ".join(t.split()) or "a"))
def test_any_title_gives_a_readable_entry(title):
    paper = Paper(key="k", title=title, authors=[Author(family="Meta AI and Friends")], venue="arXiv", year=2024,
                  arxiv="2401.00010")
    library = bibtexparser.parse_string(bibtexparser.write_string(bibtexparser.Library([bib_entry(paper, VOCAB)])))
    assert library.failed_blocks == [] and list(library.entries_dict) == ["k"]
    value = library.entries[0]["title"]
    assert value.count("{") - value.count(r"\{") == value.count("}") - value.count(r"\}")


def test_a_broken_catalogue_exports_nothing(toy, edit, tmp_path, capsys):
    edit("catalog/entries/method_1.yaml", "kind: patch", "kind: pach")
    out = tmp_path / "out"
    assert export.main(["--root", str(toy), "--out", str(out)]) == 1
    assert not out.exists() and "nothing written" in capsys.readouterr().err
