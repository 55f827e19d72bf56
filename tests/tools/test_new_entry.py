"""A new method starts as three files that ask, one by one, for what is missing."""
import subprocess
import sys

import pytest

from accel_tools import new_entry
from accel_tools.catalog import ROOT
from accel_tools.catalog.citation import from_names
from accel_tools.catalog.schema import Kind
from accel_tools.check_catalog import check

BIB = r"""@inproceedings{Weijer2025Fast,
  title = {Fast {T}oken Moving},
  author = {van de Weijer, Joost and Schmidhuber, J{\"u}rgen and Jha, Niraj K.},
  booktitle = {ICLR},
  year = {2025},
  eprint = {2503.00010},
  archivePrefix = {arXiv}
}
"""
FILES = ["catalog/entries/fast_x.yaml", "methods/fast_x.py", "tests/methods/test_fast_x.py"]
FLAGS = ["--title", 'Fast: a "Quoted" Title', "--authors", "Ann B. Cee; van de Weijer, Joost", "--year", "2025"]


def start(root, *flags, slug="fast_x", kind="patch") -> int:
    return new_entry.main(["--root", str(root), "--slug", slug, "--name", "Fast-X", "--kind", kind, *flags])


def test_from_bibtex(toy, tmp_path):
    (tmp_path / "x.bib").write_text(BIB)
    assert start(toy, "--bibtex", str(tmp_path / "x.bib"), "--code", "owner/fast") == 0
    entry, module, test = ((toy / path).read_text() for path in FILES)
    for line in ("key: weijer2025fast", 'title: "Fast Token Moving"', '{given: "Joost", family: "van de Weijer"}',
                 '{given: "Jürgen", family: "Schmidhuber"}', '{given: "Niraj K.", family: "Jha"}', 'venue: "ICLR"',
                 'arxiv: "2503.00010"', 'since: "2025-03"', 'code: "owner/fast"'):
        assert line in entry
    assert module.startswith('"""Fast-X - Fast Token Moving\n\nJoost van de Weijer, Jürgen Schmidhuber, Niraj K. Jha, '
                             'ICLR 2025. arXiv:2503.00010. Code: owner/fast\n')
    assert "from methods import fast_x" in test


def test_checker_asks_for_what_is_missing(toy, capsys):
    assert start(toy, *FLAGS, "--arxiv", "2503.00010") == 0
    texts = [str(problem) for problem in check(toy)[0]]
    assert all(": fill in: " in text for text in texts)
    asked = {file: [text.split(":")[2].strip() for text in texts if text.startswith(file)] for file in FILES}
    assert set(asked[FILES[0]]) == {"summary", "models", "tags", "mechanism"}
    assert len(asked[FILES[1]]) == 8 and len(asked[FILES[2]]) == 2


def test_filled_entry_leads_to_the_code(toy):
    assert start(toy, *FLAGS, "--arxiv", "2503.00010") == 0
    path = toy / FILES[0]
    text = path.read_text()
    for line, value in (("models: ", "[dit]"), ("  application: ", "[text2image]"), ("  training: ", "[training-free]"),
                        ("  mechanism: ", "[token-merging]"), ("mechanism: ", "It moves."), ("summary: ", "Moves.")):
        text = "\n".join(line + value if row.startswith(line) else row for row in text.split("\n"))
    path.write_text(text)
    texts = [str(problem) for problem in check(toy)[0] if "is stale" not in str(problem)]
    assert texts and all(text.startswith(tuple(FILES[1:])) and ": fill in: " in text for text in texts), texts
    assert {text.split(":")[0] for text in texts} == set(FILES[1:])


@pytest.mark.parametrize("kind", Kind.__args__)
def test_skeletons_are_as_the_linter_wants_them(toy, kind):
    """With a title and a list of authors that need several lines."""
    authors = "; ".join(f"Given{letter} Familyname{letter}" for letter in "abcdefghijkl")
    flags = ["--title", "A Title of many Words, " * 8 + "more", "--authors", authors, "--year", "2025", "--arxiv", "2503.00010"]
    assert start(toy, *flags, slug="a_method_with_a_long_slug", kind=kind) == 0
    files = [path for path in toy.rglob("*a_method_with_a_long_slug.py")]
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert len(files) == 2 and done.returncode == 0, done.stdout
    assert not [problem for problem in check(toy)[0] if "docstring must" in problem.message]


@pytest.mark.parametrize("kind", Kind.__args__)
def test_skeletons_are_python(toy, kind):
    assert start(toy, *FLAGS, "--arxiv", "2503.00010", kind=kind) == 0
    assert ("claims:" in (toy / FILES[0]).read_text()) == (kind != "patch")
    for path in FILES[1:]:
        compile((toy / path).read_text(), path, "exec")


def test_a_title_cannot_end_the_docstring(toy):
    assert start(toy, "--title", '"""; import os \\', *FLAGS[2:], "--arxiv", "2503.00010") == 0
    code = compile((toy / FILES[1]).read_text(), "x.py", "exec")
    assert code.co_consts[0].startswith('Fast-X - """; import os \\\n')


@pytest.mark.parametrize("there", FILES)
def test_nothing_is_overwritten(toy, there, capsys):
    (toy / there).write_text("mine")
    assert start(toy, *FLAGS, "--arxiv", "2503.00010") == 1
    assert f"{there} exists" in capsys.readouterr().err
    assert (toy / there).read_text() == "mine" and sum((toy / path).exists() for path in FILES) == 1


def test_a_pending_method_is_its_entry_alone(toy, capsys):
    assert start(toy, *FLAGS, "--arxiv", "2503.00010", "--pending", kind="training") == 0
    assert [path for path in FILES if (toy / path).exists()] == FILES[:1] and "pending: true" in (toy / FILES[0]).read_text()
    assert {str(problem).split(":")[0] for problem in check(toy)[0]} == {FILES[0]}


@pytest.mark.parametrize(("text", "names"), [
    ("Ann B. Cee; van de Weijer, Joost", ["Ann B.|Cee", "Joost|van de Weijer"]),
    ("Ann Bee, Carl Dee", ["Ann|Bee", "Carl|Dee"]),
    ("Ann Bee, Carl Dee and Eve Fee", ["Ann|Bee", "Carl|Dee", "Eve|Fee"]),
    ("Ann Bee, Carl Dee, and Eve Fee", ["Ann|Bee", "Carl|Dee", "Eve|Fee"]),
    ("Ann Bee and Carl Dee", ["Ann|Bee", "Carl|Dee"]),
    ("Bee, Ann and van de Weijer, Joost", ["Ann|Bee", "Joost|van de Weijer"]),
    ("Bee, Ann", ["Ann|Bee"]), ("Joost van de Weijer", ["Joost|van de Weijer"]), ("Meta", ["None|Meta"]),
    ("Ann Bee & Carl Dee;", ["Ann|Bee", "Carl|Dee"]), ("Sandra Alland", ["Sandra|Alland"]),
    ("Bee, Ann; Dee, Carl; and Fee, Eve", ["Ann|Bee", "Carl|Dee", "Eve|Fee"]),
    ("Ann Bee; Carl Dee and Eve Fee", ["Ann|Bee", "Carl|Dee", "Eve|Fee"]), ("Ann Bee,\nCarl  Dee", ["Ann|Bee", "Carl|Dee"]),
    ("Sammy Davis, Jr., Ann Bee", ["Sammy|Davis Jr.", "Ann|Bee"]), ("Davis, Jr., Sammy", ["Sammy|Davis Jr."]),
    ("Sammy Davis III and Ann Bee", ["Sammy|Davis III", "Ann|Bee"]), ("Weinan E, Li Xu", ["Weinan|E", "Li|Xu"]),
    ("J\u00fcrgen O\u2019Hara-M\u00fcller, \u738b \u4f1f", ["J\u00fcrgen|O\u2019Hara-M\u00fcller", "\u738b|\u4f1f"]),
])
def test_forms_of_authors(text, names):
    assert [f"{each['given']}|{each['family']}" for each in from_names(text)] == names


@pytest.mark.parametrize(("text", "message"), [
    ("Ann Bee et al.", "name all authors, not 'et al.'"), ("Ann Bee and others", "name all authors, not 'and others'"),
    ("Ann Bee, \u2026", "name all authors, not '\u2026'"), ("Ann Bee, Carl Dee, et al", "name all authors, not 'et al'"),
    ("Bee, Dee, Fee", "can be read in several ways; part the authors with ';'"),
    ("Bee, Ann B., Dee, Carl D.", "can be read in several ways"),
    ("Bee, Ann, Dee, Carl; Fee, Eve", "can be read in several ways"),
    ("Ann Bee1, Carl Dee2", "'1' is no part of a name"), ("Ann Bee*", "'*' is no part of a name"),
    ("{Black Forest Labs}", "'{' is no part of a name"), ("Ann Bee (MIT)", "'(' is no part of a name"),
    ("Ann Bee and", "a name is missing"), ("Ann Bee;; Carl Dee", "a name is missing"), ("; ,", "a name is missing"),
    ("Bee A, Dee C", "a family name cannot be initials"), ("Bee A.B.", "a family name cannot be initials")])
def test_authors_that_cannot_be_told(toy, text, message, capsys):
    assert start(toy, "--title", "T", "--authors", text, "--year", "2025", "--arxiv", "2503.00010") == 1
    assert message in capsys.readouterr().err and not (toy / FILES[0]).exists()


@pytest.mark.parametrize(("lines", "wanted"), [
    ("booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition}, doi = {10.1234/x}",
     ['venue: "CVPR"']),
    ("eprint = {0704.0001}", ['arxiv: "0704.0001"', 'since: "2007-04"']),
    ("eprint = {math/9811001}", ['arxiv: "math/9811001"', 'since: "1998-11"']),
    ("journal = {arXiv preprint arXiv:2503.00010v2}", ['arxiv: "2503.00010v2"', 'venue: "arXiv"']),
    ("url = {http://arxiv.org/abs/2503.00010}", ['arxiv: "2503.00010"']),
    ("doi = {10.48550/arXiv.2503.00010}", ['arxiv: "2503.00010"']),
    ("url = {https://doi.org/10.1609/aaai.v39i9.33071}", ['doi: "10.1609/aaai.v39i9.33071"', 'since: "FILL: first']),
    ("url = {https://openreview.net/forum?id=Jt1gGIumJo}", ['openreview: "Jt1gGIumJo"']),
    ("eprint = {2503.00010v2}, url = {http://arxiv.org/abs/2503.00010}", ['arxiv: "2503.00010v2"']),
    ("eprint = {math.GT/0309136}, archivePrefix = {arXiv}", ['arxiv: "math/0309136"', 'since: "2003-09"']),
    ("eprint = {2503.00010}, eprinttype = {arxiv}, journaltitle = {ACM Transactions on Graphics}", ['venue: "ACM TOG"']),
    ("note = {See arXiv:2503.00010}", ['arxiv: "2503.00010"']),
])
def test_what_bibtex_says_otherwise(toy, tmp_path, lines, wanted):
    (tmp_path / "x.bib").write_text("@misc{x, title={T}, author={Ann Bee and Carl Dee}, year={2025}, " + lines + "}")
    assert start(toy, "--bibtex", str(tmp_path / "x.bib")) == 0
    entry, module = (toy / FILES[0]).read_text(), (toy / FILES[1]).read_text()
    assert [line for line in wanted if line not in entry] == [] and "None" not in module.split("from __future__")[0]


@pytest.mark.parametrize(("flags", "message"), [
    (["--arxiv", "2001.10002"], "--arxiv: '2001.10002' is already used at catalog/entries/method_2.yaml:"),
    (["--arxiv", "https://arxiv.org/abs/2001.10002v1"], "--arxiv: '2001.10002v1' is already used"),
    (["--doi", "10.48550/arXiv.2001.10002"], "is already used at catalog/entries/method_2.yaml:"),
    (["--venue", "Nowhere", "--arxiv", "2503.00010"], "--venue: 'Nowhere' is no venue of catalog/vocab.yaml"),
    ([], "needs one of arxiv, openreview, doi, url"),
])
def test_what_the_checker_would_refuse_is_not_written(toy, flags, message, capsys):
    assert start(toy, *FLAGS, *flags) == 1
    assert message in capsys.readouterr().err and not (toy / FILES[0]).exists()


@pytest.mark.parametrize(("slug", "flags", "message"), [
    ("Fast-X", FLAGS, "--slug: 'Fast-X' must be lower-case letters"),
    ("../x", FLAGS, "--slug: '../x' must be"),
    ("class", FLAGS, "--slug: 'class' is a word of Python"),
    ("fast_x", FLAGS[:4], "--year: Field required"),
    ("fast_x", ["--title", "T", "--year", "2025"], "--authors: Field required"),
    ("fast_x", [*FLAGS, "--arxiv", "hello"], "--arxiv: must be a quoted arXiv id"),
    ("fast_x", ["--bibtex", "/nowhere.bib"], "No such file"),
])
def test_bad_input_is_told_and_writes_nothing(toy, slug, flags, message, capsys):
    before = sorted(toy.rglob("*"))
    assert start(toy, *flags, slug=slug) == 1
    assert message in capsys.readouterr().err
    assert sorted(toy.rglob("*")) == before


@pytest.mark.parametrize(("text", "message"), [
    ("", "needs exactly one BibTeX entry, has 0"), (BIB + BIB.replace("Weijer2025Fast", "b"), "has 2"),
    ("@article{x, title = {a}", "x.bib:1: this BibTeX cannot be read"),
    (BIB.replace("  title", "  titel"), "--title: Field required"),
    (BIB.replace("{ICLR}", '"IC" # "LR"'), "x.bib:1: booktitle is joined from pieces"),
    (BIB.replace("Jha, Niraj K.", "others"), "name all authors, not 'others'"),
    (BIB.replace("  year", "  url = {https://arxiv.org/abs/2503.00011},\n  year"),
     "--url: 'https://arxiv.org/abs/2503.00011' names another paper than eprint 'arxiv:2503.00010'"),
    (BIB.replace("  year", "  year = {2024},\n  year"), "x.bib:1: this BibTeX cannot be read: Duplicate field keys"),
])
def test_bad_bibtex_is_told(toy, tmp_path, text, message, capsys):
    (tmp_path / "x.bib").write_text(text)
    assert start(toy, "--bibtex", str(tmp_path / "x.bib")) == 1
    assert message in capsys.readouterr().err and not (toy / FILES[0]).exists()


def test_what_is_left_out_of_a_bibtex_file_is_told(toy, tmp_path, capsys):
    before = "Copied by hand.\n@comment{kept}\n@string{iclr = {ICLR}}\n@string{idle = {Idle}}\n"
    more = "pages = {1--9},\n  Abstract = {Long.},\n  journal = {Twice},\n  note = {Oral},\n  year"
    (tmp_path / "x.bib").write_text(before + BIB.replace("{ICLR}", "iclr").replace("year", more))
    assert start(toy, "--bibtex", str(tmp_path / "x.bib")) == 0
    told = [line.removeprefix(f"{tmp_path / 'x.bib'}:") for line in capsys.readouterr().err.splitlines()]
    assert told == ["5: left out: abstract, journal, note, pages", "1: left out: Copied by hand.",
                    "2: left out: @comment{kept}", "4: left out: @string{idle = {Idle}}"]
    assert 'venue: "ICLR"' in (toy / FILES[0]).read_text()


def test_nothing_is_told_of_a_file_that_is_read_whole(toy, tmp_path, capsys):
    (tmp_path / "x.bib").write_text(BIB)
    assert start(toy, "--bibtex", str(tmp_path / "x.bib")) == 0
    out, err = capsys.readouterr()
    assert err == "" and "authors: van de Weijer, Joost; Schmidhuber, J\u00fcrgen; Jha, Niraj K." in out


def test_braces_hold_the_words_of_a_name_together(toy, tmp_path):
    names = r"{Black Forest Labs} and \v{S}ime {\"O}z and {Barnes and Noble} and Davis, Jr., Sammy"
    (tmp_path / "x.bib").write_text(BIB.replace(BIB.split("author = {")[1].split("},\n")[0], names))
    assert start(toy, "--bibtex", str(tmp_path / "x.bib")) == 0
    authors = [line.strip() for line in (toy / FILES[0]).read_text().splitlines() if "family:" in line]
    assert authors == ['- {family: "Black Forest Labs"}', '- {given: "\u0160ime", family: "\u00d6z"}',
                       '- {family: "Barnes and Noble"}', '- {given: "Sammy", family: "Davis Jr."}']


def test_a_paper_like_another_is_told_and_written(toy, tmp_path, capsys):
    title = "Made-up Method 2: a Title as Long as Titles Usually Are in This Field"
    (tmp_path / "x.bib").write_text(BIB.replace("Fast {T}oken Moving", title).replace("van de Weijer, Joost", "{Family2}, G."))
    assert start(toy, "--bibtex", str(tmp_path / "x.bib")) == 0
    assert "warning: title and first author are those of catalog/entries/method_2.yaml:" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "wanted"), [
    (["--arxiv", "https://arxiv.org/pdf/2503.00010v2.pdf"], 'arxiv: "2503.00010v2"'),
    (["--arxiv", "arXiv:math.GT/0309136"], 'arxiv: "math/0309136"'),
    (["--url", "arxiv.org/abs/2503.00010"], 'arxiv: "2503.00010"'),
    (["--doi", "https://doi.org/10.1609/AAAI.v39i9.33071"], 'doi: "10.1609/aaai.v39i9.33071"'),
    (["--openreview", "https://openreview.net/forum?id=Jt1gGIumJo"], 'openreview: "Jt1gGIumJo"')])
def test_an_id_may_be_given_as_an_address(toy, flags, wanted):
    assert start(toy, *FLAGS, *flags) == 0
    assert wanted in (toy / FILES[0]).read_text()
