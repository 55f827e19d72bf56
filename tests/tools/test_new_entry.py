"""A new method starts as three files that ask, one by one, for what is missing."""
import pytest

from accel_tools import new_entry
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


@pytest.mark.parametrize(("slug", "flags", "message"), [
    ("Fast-X", FLAGS, "--slug: 'Fast-X' must be lower-case letters"),
    ("../x", FLAGS, "--slug: '../x' must be"),
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


@pytest.mark.parametrize("text", ["", BIB + BIB.replace("Weijer2025Fast", "b"), "@article{x, title = {a}"])
def test_bad_bibtex_is_told(toy, tmp_path, text, capsys):
    (tmp_path / "x.bib").write_text(text)
    assert start(toy, "--bibtex", str(tmp_path / "x.bib")) == 1
    assert "x.bib" in capsys.readouterr().err
