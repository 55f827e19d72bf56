"""The loader: each class of error is told with its file and line, all of them at once, and nothing else escapes."""
import json
import random
import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_tools import render_readme
from accel_tools.catalog import ROOT, CatalogError, load
from accel_tools.catalog.schema import json_schema
from accel_tools.catalog.yaml_lines import parse
from accel_tools.measure.growth import synthetic

ENTRY = "catalog/entries/method_2.yaml"
PAPER = "family2method"
ARXIV = '"2001.10002"'


def errors(root) -> list[str]:
    with pytest.raises(CatalogError) as caught:
        load(root)
    return [str(problem) for problem in caught.value.problems]


def test_real_catalogue_loads():
    catalog = load()
    assert len(catalog.entries) >= 52
    assert all(entry.slug == slug for slug, entry in catalog.entries.items())
    assert catalog.line("tome", "papers", 0, "arxiv") > catalog.line("tome", "papers", 0, "title") > 1


def test_toy_catalogue_loads(toy):
    assert list(load(toy).entries) == ["method_1", "method_2", "method_3"]


@pytest.mark.parametrize(("old", "new", "message"), [
    pytest.param("name: Method 2\n", "", "name: missing key", id="missing key"),
    pytest.param("builds_on: []", "bulds_on: []", "bulds_on: unknown key; did you mean 'builds_on'?", id="unknown key"),
    pytest.param("    venue: arXiv", "    venu: arXiv", "papers.0.venu: unknown key; did you mean 'venue'?", id="deep"),
    pytest.param("kind: patch", "kind: pach", "kind: Input should be 'patch', 'decoder'", id="unknown kind"),
    pytest.param("kind: patch", "kind: patch\nkind: patch", "key 'kind' stands twice (first on line 3)", id="same key"),
    pytest.param("token-merging", "token-mergin", "no term of mechanism; did you mean 'token-merging'?", id="term"),
    pytest.param("[unet, dit]", "[unet, dit, zzz]", "models: 'zzz' is no term of model; allowed:", id="model"),
    pytest.param("[unet, dit]", "[unet, unet]", "models: 'unet' stands twice", id="same term"),
    pytest.param("[unet, dit]", "[]", "models: List should have at least 1 item", id="no model"),
    pytest.param("A made-up", "A made-up" + " very" * 30, "summary: String should have at most 140", id="long summary"),
    pytest.param('"2024-01-15"', '"2024-02-30"', "since: is no date", id="no date"),
    pytest.param('"2024-01-15"', '"15 Jan 2024"', "since: must be YYYY-MM-DD or YYYY-MM", id="date form"),
    pytest.param("year: 2024", "year: soon", "papers.0.year: Input should be a valid integer", id="year"),
    pytest.param(ARXIV, '"2001.1"', "papers.0.arxiv: must be a quoted arXiv id", id="arxiv form"),
    pytest.param(ARXIV, '"2001.10001"', "papers.0.arxiv: '2001.10001' is already used at", id="same arxiv"),
    pytest.param(ARXIV, '"2001.10001v2"', "only with different versions", id="arxiv with and without version"),
    pytest.param(PAPER, "family1method", "papers.0.key: 'family1method' is already used at", id="same key"),
    pytest.param("family: Family4}", "family: others}", "name all authors, not 'others'", id="others"),
    pytest.param(f"    arxiv: {ARXIV}\n", "", "needs one of arxiv, openreview, doi, url", id="no link"),
    pytest.param("code: owner/method2", "code: http://x.org/a", "must be owner/repo on GitHub or an https", id="http"),
    pytest.param(f"    arxiv: {ARXIV}", "    url: http://x.org", "papers.0.url: must be an https:// link", id="scheme"),
    pytest.param(f"    arxiv: {ARXIV}", "    url: javascript:alert(1)", "must be an https:// link", id="script"),
    pytest.param("kind: patch", "kind: decoder", "claims: a decoder must say what it saves, some of macs", id="no claim"),
    pytest.param("builds_on: []", "claims: [speed]\nbuilds_on: []", "claims.0: Input should be 'macs', 'memory'", id="claim"),
    pytest.param("builds_on: []", "claims: [macs, none]\nbuilds_on: []", "and none stands alone", id="none and more"),
    pytest.param("builds_on: []", "claims: [macs, macs]\nbuilds_on: []", "claims: each stands once", id="claim twice"),
    pytest.param("builds_on: []", "builds_on: [method_9]", "'method_9' is no other entry; did you mean", id="parent"),
    pytest.param("builds_on: []", "builds_on: [method_2]", "'method_2' is no other entry", id="own parent"),
    pytest.param("in: token-wise/image,", "in: token-wise/sound,", "rows.0.in: no such section; did you", id="section"),
    pytest.param("image, rank: 2}", "image, rank: 1}", "already has number 1 at catalog/entries/method_1", id="rank"),
    pytest.param("image, rank: 2}", "image, rank: 0}", "rows.0.rank: Input should be greater than", id="rank 0"),
    pytest.param("    row: 2", "    row: 7", "this entry has no row 7 in token-wise/image", id="erratum row"),
    pytest.param("field: venue", "field: place", "errata.0.field: Input should be 'badge', 'title'", id="field"),
    pytest.param("speedup: 1.5", "speedup: .nan", "reported.0.speedup: Input should be", id="not a number"),
    pytest.param("notes: \"Nothing.\"", "pending: maybe", "pending: Input should be a valid boolean", id="flag"),
    pytest.param("notes: \"Nothing.\"", "notes: &a x\nsummary2: *a", "anchors and aliases are not allowed", id="alias"),
    pytest.param("name: Method 2", "name: !!python/name:os.system x", "is not allowed; write plain YAML", id="tag"),
    pytest.param("name: Method 2", "name: \"a\\nb\"", "name: must be one line of printable characters", id="break"),
    pytest.param("name: Method 2", "name: \"a\\u202eb\"", "must be one line of printable characters", id="bidi"),
    pytest.param("name: Method 2", "name: [", "not valid YAML:", id="syntax"),
    pytest.param("name: Method 2", "name: \"FILL: the name\"", "name: fill in: the name", id="still to write"),
])
def test_each_error_is_told(toy, edit, old, new, message):
    line = edit(ENTRY, old, new)
    found = errors(toy)
    assert any(text.startswith(f"{ENTRY}:") and message in text for text in found), found
    [told] = [int(text.split(":")[1]) for text in found if message in text][:1]
    whole = "missing key" in message or "needs one of" in message      # told where the mapping begins
    assert told <= line if whole else abs(told - line) <= 2, (found, line)


def test_a_patch_claims_arithmetic_unless_it_says_otherwise(toy, edit):
    edit(ENTRY, "builds_on: []", "claims: [quality]\nbuilds_on: []")
    edit("catalog/entries/method_3.yaml", "kind: patch", "kind: training\npending: true")
    assert [entry.claims for entry in load(toy).entries.values()] == [["macs"], ["quality"], []]


def test_all_errors_at_once(toy, edit):
    edit(ENTRY, "kind: patch", "kind: pach")
    edit(ENTRY, "year: 2024", "year: soon")
    edit("catalog/entries/method_3.yaml", "name: Method 3\n", "")
    edit("catalog/entries/method_1.yaml", "token-merging", "token-marching")
    found = errors(toy)
    assert len(found) == 4
    assert [text.split(":")[0] for text in found] == [
        "catalog/entries/method_1.yaml", ENTRY, ENTRY, "catalog/entries/method_3.yaml"]


def test_gap_in_a_list(toy, edit):
    edit(ENTRY, "{in: token-wise/image, rank: 2}, ", "")
    edit(ENTRY, "list: token-wise/image", "list: training-free/stable-diffusion")
    [found] = errors(toy)
    assert found.startswith("catalog/lists/token-wise.yaml:")
    assert found.endswith("sections.0: no entry stands at 2 of token-wise/image")


@pytest.mark.parametrize("name", ["Method_2.yaml", "2.yaml", "method_4.yml", "a-b.yaml"])
def test_file_name_is_the_slug(toy, name):
    shutil.copy(toy / ENTRY, toy / "catalog/entries" / name)
    assert any("file name must be <slug>.yaml" in text for text in errors(toy))


def test_not_utf8(toy):
    (toy / ENTRY).write_bytes(b"name: \xff\xfe")
    assert errors(toy) == [f"{ENTRY}:1: not UTF-8: byte 6 cannot be decoded"]


def test_missing_vocabulary(toy):
    (toy / "catalog/vocab.yaml").unlink()
    assert errors(toy) == ["catalog/vocab.yaml:1: cannot be read: No such file or directory"]


def test_versions_may_share_an_arxiv_id(toy, edit):
    edit("catalog/entries/method_1.yaml", '"2001.10001"', '"2001.10001v1"')
    edit(ENTRY, ARXIV, '"2001.10001v2"')
    assert len(load(toy).entries) == 3


def test_scalars_are_never_guessed():
    data, _, problems = parse("a: 2401.00010\nb: no\nc: 2024-01-01\nd: 1_000\ne: ~\nf: 0x10\n", "x.yaml")
    assert data == {"a": "2401.00010", "b": "no", "c": "2024-01-01", "d": "1_000", "e": None, "f": "0x10"}
    assert problems == []


def test_deep_nesting_is_an_error_not_a_crash():
    data, _, problems = parse("[" * 5000, "x.yaml")
    assert data is None and len(problems) == 1


def test_schema_is_in_step_with_the_models():
    text = (ROOT / "catalog/schema.json").read_text()
    assert text == json_schema(load().vocab)
    assert json.loads(text)["$schema"] == "http://json-schema.org/draft-07/schema#"


# ---- mutated entries ---------------------------------------------------------------------------------------------

FRAGMENTS = ["", "null", "[]", "{}", "[[]]", "true", "-1", "1e999", ".nan", "0x1F", "'", '"', ":", "- ", "\t", "&a",
             "*a", "<<: *a", "!!python/object:os.system", "%YAML 9", "---", "...", "\x00", "\u2028", "\U0001f4e2",
             "a" * 300, "{a: {b: [c]}}", "? x", "2024-13-99", "../../etc/passwd", "{{ 7*7 }}", "<script>", "](http://x)"]


def mutate(text: str, seed: int, steps: int) -> bytes:
    """Drops, doubles, swaps, retypes and garbles lines, words and bytes of an entry."""
    draw = random.Random(seed)
    for _ in range(steps):
        lines = text.split("\n")
        i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
        match draw.randrange(7):
            case 0:
                del lines[i]
            case 1:
                lines.insert(j, lines[i])
            case 2:
                lines[i], lines[j] = lines[j], lines[i]
            case 3:
                lines[i] = lines[i].split(":")[0] + ": " + draw.choice(FRAGMENTS)
            case 4:
                lines[i] = draw.choice(("", " ", "  ", "    ")) + lines[i].lstrip()
            case 5:
                words = lines[i].split(" ")
                words[draw.randrange(len(words))] = draw.choice(FRAGMENTS)
                lines[i] = " ".join(words)
            case 6:
                at = draw.randrange(len(lines[i]) + 1)
                lines[i] = lines[i][:at] + draw.choice(FRAGMENTS) + lines[i][at + draw.randrange(3):]
        text = "\n".join(lines)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if data and draw.random() < 0.2:
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One entry and a vocabulary cut to what it uses, so that thousands of loads stay quick."""
    root = tmp_path_factory.mktemp("small") / "toy"
    synthetic(1, root)
    for file in ("catalog/lists/since-2025.yaml", "SINCE.md"):      # its sections name terms that are taken away
        (root / file).unlink()
    lines = (root / "catalog/vocab.yaml").read_text().splitlines()
    used = ("unet:", "dit:", "image-generation:", "text2image:", "training-free:", "similarity-based:",
            "token-merging:", "token-compression:", "patch:", "decoder:", "module:", "training:", "compress:",
            "parallel:")
    kept = [line for line in lines if not line.startswith("    ") or line.strip().startswith(used)]
    text = "\n".join(kept)
    (root / "catalog/vocab.yaml").write_text(re.sub(r"terms:\n(?!    )", "terms: {}\n", text))
    load(root)
    return root


ONE = "catalog/entries/method_1.yaml"
MUTATED = settings(max_examples=2000, deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])

@pytest.fixture(scope="module")
def entry_text(small):
    return (small / ONE).read_text()


@MUTATED
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 6))
def test_a_mutated_entry_is_refused_or_sound_and_never_written(small, entry_text, seed, steps, capsys):
    garbled = mutate(entry_text, seed, steps)
    (small / ONE).write_bytes(garbled)
    generated = ["README.md", "TOKEN-WISE.md", "TRAINING-FREE.md", "catalog/schema.json"]
    before = {name: (small / name).read_bytes() for name in generated}
    status = render_readme.main(["--root", str(small)])         # raises nothing, whatever the bytes
    capsys.readouterr()
    assert (small / ONE).read_bytes() == garbled
    if status:
        assert before == {name: (small / name).read_bytes() for name in generated}
    assert sorted(path.name for path in small.iterdir()) == [
        "README.md", "TOKEN-WISE.md", "TRAINING-FREE.md", "catalog", "methods", "tests"]


def test_mutations_reach_both_outcomes(small, entry_text):
    sound = 0
    for seed in range(200):
        (small / ONE).write_bytes(mutate(entry_text, seed, 1 + seed % 3))
        try:
            sound += len(load(small).entries)
        except CatalogError:
            pass
    assert 5 <= sound <= 195


@settings(max_examples=500, deadline=None)
@given(source=st.one_of(st.binary(max_size=60), st.text(max_size=60), st.text("{}[]:,-?&*!|>'\"% \n\tab", max_size=40)))
def test_any_bytes_give_data_or_problems(source):
    data, _, problems = parse(source, "x.yaml")
    assert data is None or not problems
    assert all(problem.line >= 1 for problem in problems)
