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
SOURCED = [name for name, spec in CATALOG.lists.items() if not spec.unlisted]


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
    for name in SOURCED:
        text = render_list(CATALOG, name, as_seed=True)
        found |= pieces(text, name, [section.id for section in CATALOG.lists[name].sections])
    return found


@pytest.mark.parametrize("place", HASHES)
def test_same_as_source(place, printed):
    assert printed.get(place) == HASHES[place], f"{place} does not read as in its source list"


def test_nothing_added(printed):
    assert printed.keys() == HASHES.keys()
    assert len(HASHES) == 62 + 2          # rows, and the text around the rows of two lists


def test_corrected_rows_keep_their_places():
    for name in SOURCED:
        ids = [section.id for section in CATALOG.lists[name].sections]
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
    text = "".join(render_list(CATALOG, name) for name in SOURCED)
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


def unlisted(root, **sections) -> None:
    """Give the catalogue of `root` a list of what has no row, and no other such, with sections: id -> the keys of its YAML."""
    (root / "catalog/lists/since-2025.yaml").unlink(missing_ok=True)
    made = "".join(f"  - {{id: {name}, text: '### {name}', {keys}}}\n" for name, keys in sections.items())
    (root / "catalog/lists/rest.yaml").write_text(
        f"title: The rest\nfile: REST.md\naxes: [mechanism]\nlink: abs\nunlisted: true\nheader: '# Rest'\nsections:\n{made}")


def add(root, slug: str, since: str, mechanism: str, rows: str = "") -> None:
    text = ENTRY.format(i=slug[-1], arxiv=f"25{since[5:7]}.0001{slug[-1]}", authors="      - {family: Newcomer}")
    text = re.sub("since: .*", f'since: "{since}"', text.split("rows:")[0])
    (root / f"catalog/entries/{slug}.yaml").write_text(re.sub("mechanism: .*[]]", f"mechanism: [{mechanism}]", text) + rows)


def test_what_has_no_row_goes_into_the_list_of_the_rest_newest_first(toy):
    unlisted(toy, tokens="mechanism: [token-compression], since: 2025-02", old="mechanism: []")
    for slug, since, mechanism in (("new_7", "2025-03", "token-merging"), ("new_8", "2025-02", "token-pruning"),
                                   ("new_9", "2025-01", "token-merging"), ("new_6", "2025-04", "layer-pruning")):
        add(toy, slug, since, mechanism)
    catalog = load(toy)
    assert list(catalog.lists)[-1] == "rest"
    found = {section: [(entry.slug, row.rank) for entry, row in catalog.rows("rest", section)] for section in ("tokens", "old")}
    assert found == {"tokens": [("new_7", 2), ("new_8", 1)], "old": [("new_6", 2), ("new_9", 1)]}
    text = render_list(catalog, "rest")
    assert re.findall(r"- \*\*\[(\d)]", text) == ["2", "1", "2", "1"] and "newest first" in text


def test_the_list_of_the_rest_is_not_written_in_by_hand_and_leaves_nothing_out(toy):
    unlisted(toy, tokens="mechanism: [token-merging], since: 2025-02")
    add(toy, "new_7", "2025-03", "token-merging", rows="rows: [{in: rest/tokens, rank: 1}]\n")
    with pytest.raises(CatalogError, match="new_7.yaml:[0-9]+: rows.0.in: rest/tokens takes what has no row by itself"):
        load(toy)
    add(toy, "new_7", "2025-01", "token-merging")
    with pytest.raises(CatalogError, match="new_7.yaml:[0-9]+: no section of rest takes this entry"):
        load(toy)
    unlisted(toy, tokens="mechanism: [token-mergin]")
    with pytest.raises(CatalogError, match="rest.yaml:8: sections.0.mechanism: did you mean 'token-merging'?"):
        load(toy)
