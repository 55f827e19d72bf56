"""The pure half of the site: catalogue in, text out.

    UPDATE_GOLDEN=1 pytest tests/site/test_pages.py     # accept what the toy catalogue renders to now
"""
import csv
import html
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from markdown import markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

from accel_tools import mkdocs_hook, render_site
from accel_tools.catalog.method_source import parse
from accel_tools.pages.markdown_text import code, fence, md, number, prose
from accel_tools.pages.site import read
from accel_tools.render_site import nav, pages

HERE = Path(__file__).parent
TOY, GOLDEN = HERE / "toy", HERE / "golden"
EXTENSIONS = ["attr_list", "md_in_html", "tables", "admonition", "pymdownx.superfences", "pymdownx.details"]
HOSTILE = [
    "a * b * c_d_e", "<b>bold</b> & &amp; &#42;", "[text](link) ![image](x)", "`code` ``", "x { .class #id }",
    "| a | b |", "# no heading", "- no item", "1. no item", "> no quote", ": no definition", "!!! no admonition",
    "??? no details", r"\* back\slash", "J{\\\"u}rgen}", "<https://no.link>", "~~no~~ ^no^ ==no==", "+ x", "=== x",
    "∆-DiT F³",
]


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page)).strip()


def test_pages_of_the_toy_catalogue_are_the_golden_ones():
    made = {name: re.sub(r'(<svg class="plot"[^>]*>).*?(?=</svg>)', r"\1", text, flags=re.S)     # plots have tests of their own
            for name, text in pages(read(TOY)).items() if name.endswith(".md")}
    if os.environ.get("UPDATE_GOLDEN"):
        shutil.rmtree(GOLDEN, ignore_errors=True)
        for name, text in made.items():
            (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / name).write_text(text, encoding="utf-8")
    golden = {path.relative_to(GOLDEN).as_posix(): path.read_text(encoding="utf-8")
              for path in GOLDEN.rglob("*") if path.is_file()}
    assert made.keys() == golden.keys()
    for name, text in made.items():
        assert text == golden[name], f"{name} differs; UPDATE_GOLDEN=1 accepts it"


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_is_shown_as_it_is(text):
    assert text_of(markdown(md(text), extensions=EXTENSIONS)) == text
    assert text_of(markdown(code(text), extensions=EXTENSIONS)) == text
    table = markdown(f"| head | other |\n| --- | --- |\n| {md(text)} | {code(text)} |", extensions=EXTENSIONS)
    cells = re.findall(r"<td>(.*?)</td>", table, re.S)
    assert [text_of(cell) for cell in cells] == [text, text]


def test_prose_keeps_paragraphs_and_code():
    shown = markdown(prose("One `a * b` and\n*two*.\n\nThree `x|y`"), extensions=EXTENSIONS)
    assert shown == "<p>One <code>a &#42; b</code> and &#42;two&#42;.</p>\n<p>Three <code>x&#124;y</code></p>"


@pytest.mark.parametrize("value, form, shown", [
    (0.0312, "seconds", "31.2 ms"), (2.5, "seconds", "2.5 s"), (1.5, "times", "1.50×"), (0, "bytes", "0 B"),
    (1_234_000_000, "count", "1.23 G"), (3 * 2**20, "bytes", "3 MiB"), (27.31234, "plain", "27.31"),
    (500, "plain", "500"), (None, "times", ""), ([0.49, 0.52], "plain", "0.49 to 0.52"),
    ({"mean": 1, "of": "a"}, "plain", "mean 1, of a"),
])
def test_numbers(value, form, shown):
    assert number(value, form) == shown


def test_fence_outlasts_the_ticks_of_its_text():
    text = 'a = "```"\nb = "````"'
    assert text in html.unescape(markdown(fence(text, "text"), extensions=EXTENSIONS))


def test_source_of_a_page_keeps_its_lines():
    """Links of the map go to line numbers, so the block must hold the file line for line."""
    toy = read(TOY)
    page = pages(toy)["methods/alpha.md"]
    block = re.search(r"    ````\{[^\n]*\n(.*?)\n    ````", page, re.S)[1]
    lines = [line.removeprefix("    ") for line in block.split("\n")]
    assert lines == toy.methods["alpha"].text.rstrip().split("\n")
    for name, line in toy.methods["alpha"].lines.items():
        assert name.split(".")[-1] in lines[line - 1]


def test_results_as_a_file_have_one_line_for_each_run_of_the_pages():
    toy = read(TOY)
    rows = list(csv.DictReader(io.StringIO(pages(toy)["results.csv"])))
    records = [(slug, record) for slug, result in toy.results.items() for record in result["records"]]
    methods = [row for row in rows if row["kind"] == "method"]
    assert sorted((row["slug"], row["model"]) for row in methods) == sorted(
        (slug, record["model"]) for slug, record in records if "method" in record["arms"])
    for row in methods:
        record = next(record for slug, record in records if (slug, record["model"], record["config"])
                      == (row["slug"], row["model"], json.loads(row["config"])))
        assert json.loads(row["speedup"] or "null") == record["arms"]["method"].get("speedup")
        assert bool(row["verdict"]) == bool(row["why"]) and row["stale"] == "yes"
    assert {row["kind"] for row in rows} >= {"plain", "method"}


def test_reported_and_measured_numbers_share_no_table():
    page = pages(read(TOY))["methods/alpha.md"]
    tables = re.findall(r"(?:^\|.*\n)+", page, re.M)
    assert not [table for table in tables if "33.12" in table and "500 ms" in table]
    assert "stale" in page


def test_without_results_compatibility_code_and_kernels(tmp_path):
    for part in ("catalog/vocab.yaml", "catalog/lists", "catalog/entries"):
        source, target = TOY / part, tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    made = pages(read(tmp_path))
    assert "Not tested yet" in made["models/index.md"]
    assert "Measured here" not in made["methods/alpha.md"]
    assert "There is no kernel yet" in made["kernels/index.md"]


def test_every_generated_page_is_in_the_navigation_or_named_in_the_configuration():
    site = read(TOY)
    below, listed = nav(site), set()
    stack = [list(below.values())]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            listed.add(item)
        else:
            stack += item.values() if isinstance(item, dict) else item
    top = {"index.md", "stacking.md", "surroundings.md", "zoo.md", "corrections.md", "download.md", *below}
    assert {name for name in pages(site) if name.endswith(".md")} == listed | top


def test_out_writes_a_complete_docs_folder(tmp_path):
    assert render_site.main(["--root", str(TOY), "--out", str(tmp_path)]) == 0
    for name, text in pages(read(TOY)).items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text


def test_a_broken_catalogue_writes_nothing_and_stops_mkdocs(tmp_path, capsys):
    root = tmp_path / "toy"
    shutil.copytree(TOY, root)
    (root / "catalog/entries/beta.yaml").write_text("name: [", encoding="utf-8")
    assert render_site.main(["--root", str(root), "--out", str(tmp_path / "out")]) == 1
    assert "catalog/entries/beta.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(PluginError, match="beta.yaml"):
        mkdocs_hook.on_files([], MkDocsConfig(config_file_path=str(root / "mkdocs.yml")))


@pytest.mark.slow
def test_real_catalogue_is_read_and_rendered_in_twenty_seconds():
    start = time.process_time()              # of this process: other load does not count; coverage takes half of it
    site = read()
    made = pages(site)
    assert time.process_time() - start < 20
    assert {f"methods/{slug}.md" for slug in site.catalog.entries} <= made.keys()
    for card in site.trained.values():
        assert f"code>{card['name'].replace('_', '&#95;')}</code>" in made[f"methods/{card['method']}.md"]
    assert "| two learners for each token | 20 |" in made["methods/acm.md"]


@pytest.mark.slow
def test_map_departures_and_example_of_every_implemented_method_are_found():
    for slug, module in read().methods.items():
        assert module.map and module.sections.get("Idea"), slug
        for row in module.map:
            assert row.names, f"{slug}: {row}"
        for name in (name for row in module.map for name in row.names if "." not in name):
            assert name in module.lines, f"{slug}: the map names {name}, which the module does not define"


def test_docstring_parts():
    module = parse((TOY / "methods/alpha.py").read_text(encoding="utf-8"))
    assert module.sections["Idea"] == "everything is\nmerged."
    assert [row.names for row in module.map] == [["merge"], ["_State.undo", "methods._core.patch"]]
    assert module.map[1].what == "merge, and undo it in every block"
    assert module.departures == ["One sentence that runs over two lines.", "Another with `code | pipe`."]
    assert module.example == "from methods import alpha\nalpha.merge(\n    2)\n# 2"
    assert [(f.name, f.default, f.comment) for f in module.config] == [
        ("ratio", "0.5", "r, Eq. 1"), ("name", "None", "a pipe | and *stars*, on two lines")]
    assert [f.signature for f in module.functions] == ["merge(x)", "apply(target, config: Config=Config())"]
