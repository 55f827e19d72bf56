"""With its errata undone, each list is the one it came from: same rows, order, numbers, badges and headings."""
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from accel_tools import render_readme
from accel_tools.catalog import ROOT, CatalogError, load
from accel_tools.measure.growth import ENTRY
from accel_tools.pages.lists import render_list

HASHES = json.loads(Path(__file__).with_name("seed_hashes.json").read_text())
CATALOG = load()


def pieces(text: str, name: str, sections: list[str]) -> dict[str, str]:
    """Place -> hash of the text with white space normalised; `<list>/text` is all that stands outside the rows."""
    found: dict[str, list[str]] = {f"{name}/text": []}
    place, current = f"{name}/text", -1
    for line in text.splitlines():
        if line.startswith("### "):
            current, place = current + 1, f"{name}/text"
        elif row := re.match(r"- \*\*\[(\d+)\]", line):
            place = f"{name}/{sections[current]}/{row[1]}"
        found.setdefault(place, []).append(line)
    return {place: hashlib.sha256(" ".join(" ".join(lines).split()).encode()).hexdigest()[:16]
            for place, lines in found.items()}


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    found = {}
    for name, spec in CATALOG.lists.items():
        text = render_list(CATALOG, name, as_seed=True)
        found |= pieces(text, name, [section.id for section in spec.sections])
    return found


@pytest.mark.parametrize("place", HASHES)
def test_same_as_source(place, printed):
    assert printed.get(place) == HASHES[place], f"{place} does not read as in its source list"


def test_nothing_added(printed):
    assert printed.keys() == HASHES.keys()
    assert len(HASHES) == 62 + 2          # rows, and the text around the rows of two lists


def test_corrected_rows_keep_their_places():
    for name, spec in CATALOG.lists.items():
        ids = [section.id for section in spec.sections]
        corrected = pieces(render_list(CATALOG, name), name, ids)
        assert [place for place in corrected if place in HASHES] == [place for place in HASHES if place.startswith(f"{name}/")]


def test_a_new_paper_goes_behind_the_last_row_of_a_source(tmp_path):
    shutil.copytree(ROOT / "catalog", tmp_path / "catalog")
    row = max(row.rank for _, row in CATALOG.rows("token-wise", "video")) + 1
    entry = ENTRY.format(i=row, arxiv="2503.00010", authors="      - {family: Newcomer}").split("errata:")[0]
    file = tmp_path / "catalog/entries/newcomer.yaml"
    file.write_text(re.sub("rows: .*", f"rows: [{{in: token-wise/video, rank: {row}}}]", entry))
    catalog = load(tmp_path)
    text = render_list(catalog, "token-wise")
    assert f"- **[{row}] Made-up Method" in text and text.endswith("Added since, at the end of their sections: 1.\n")
    as_seed = render_list(catalog, "token-wise", as_seed=True)
    assert as_seed == render_list(CATALOG, "token-wise", as_seed=True)
    erratum = f"{{list: token-wise/video, row: {row}, field: venue, seed: a, corrected: b, reason: c, evidence: d}}"
    file.write_text(f"{file.read_text()}errata: [{erratum}]\n")
    with pytest.raises(CatalogError, match=f"errata.0: row {row} of token-wise/video is none of its source's"):
        load(tmp_path)
    file.write_text(entry.split("rows:")[0] + f"rows: [{{in: token-wise/video, rank: {row + 1}}}]\n")
    with pytest.raises(CatalogError, match=f"no entry stands at {row} of token-wise/video"):
        load(tmp_path)


def test_known_errors_of_the_sources_are_gone():
    text = "".join(render_list(CATALOG, name) for name in CATALOG.lists)
    for wrong in ("brownuction", "Prunning", "modals", '{\\"u}', "others.*", "researchgate", "<sup>"):
        assert wrong not in text
    agent = CATALOG.entries["agent_attention"].papers[0]
    assert agent.arxiv == "2312.08874" and text.count("2312.01026") == 2      # Token Fusion, once in each list
    assert text.count("2410.05317") == 2                                      # ToCa, no longer DuCa


def test_as_seed_writes_to_the_given_folder_only(tmp_path, capsys):
    before = {path: path.read_bytes() for path in CATALOG.root.glob("*.md")}
    assert render_readme.main(["--as-seed", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["TOKEN-WISE.md", "TRAINING-FREE.md"]
    assert before == {path: path.read_bytes() for path in CATALOG.root.glob("*.md")}
