"""A method of each kind is added to a copy of this tree by the commands of CONTRIBUTING and nothing else, until it is green."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
KINDS = ("patch", "decoder", "module", "training", "compress", "parallel")
GENERATED = {"README.md", "SINCE.md", *(f"catalog/{table}.json" for table in ("compatibility", "pairs", "surroundings"))}
FACTS = {"summary": '"A toy."', "claims": "[macs]", "models": "[dit]", "application": "[text2image]",
         "training": "[training-free]", "mechanism": "[token-merging]"}


class Tree:
    """A copy of this tree, with an environment of its own that is the interpreter of these tests."""

    def __init__(self, root: Path):
        self.root = root
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
        for name in listed.stdout.split("\n")[:-1]:
            if (ROOT / name).is_file() and not name.endswith(".safetensors"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, root / name)
        (root / ".venv/bin").mkdir(parents=True)
        (root / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (root / ".venv/bin/python").chmod(0o755)
        for stamp in ("tools", "tests"):
            (root / f".venv/{stamp}.stamp").touch()

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True)

    def files(self) -> dict[str, bytes]:
        found = {path.relative_to(self.root): path for path in self.root.rglob("*") if path.is_file()}
        return {name.as_posix(): path.read_bytes() for name, path in found.items()
                if name.parts[0] not in (".venv", ".pytest_cache", ".hypothesis") and "__pycache__" not in name.parts}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return Tree(tmp_path_factory.mktemp("tree"))


def paper(kind: str, number: int) -> str:
    """BibTeX of the paper of a toy."""
    return (f"@article{{bee2025{kind}, title = {{A Toy of Kind {kind.capitalize()}}}, author = {{Bee, Ann and Dee, Carl}}, "
            f"year = {{2025}}, eprint = {{2503.000{number}}}}}")


def add(tree: Tree, kind: str) -> list[str]:
    """Start a method, be told what is missing, fill it in. -> the files"""
    slug = f"toy_{kind}"
    (tree.root / ".venv/paper.bib").write_text(paper(kind, 11 + KINDS.index(kind)))
    written = [f"catalog/entries/{slug}.yaml", f"methods/{slug}.py", f"tests/methods/test_{slug}.py"]
    done = tree.run("make", "method", f"SLUG={slug}", f'ARGS=--name "Toy {kind}" --kind {kind} --bibtex .venv/paper.bib')
    asked = re.findall(r"^(\S+?):\d+: .*fill in: ", done.stdout, re.M)
    assert done.returncode and set(asked) == set(written) and "Traceback" not in done.stdout, done.stdout + done.stderr
    entry = tree.root / written[0]
    entry.write_text(re.sub(r"^( *)(\w+): \[?\"FILL.*$", lambda line: f"{line[1]}{line[2]}: " + (
        '"Toys."' if (line[1], line[2]) == ("", "mechanism") else FACTS[line[2]]), entry.read_text(), flags=re.M))
    shutil.copyfile(ROOT / f"tests/toys/{slug}.py", tree.root / written[1])
    shutil.copyfile(ROOT / f"tests/toys/checks_of_{slug}.py", tree.root / written[2])
    return written


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_of_each_kind_gets_to_green_by_three_files(tree, kind):
    before = tree.files()
    written = add(tree, kind)
    done = tree.run("make", "method", f"SLUG=toy_{kind}", "WORKERS=0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout.split("tests/methods/")[-1])
    after = tree.files()
    assert after.keys() - before.keys() == set(written)
    assert {name for name in before if after.get(name) != before[name]} <= GENERATED


def test_all_of_them_together_are_green(tree):
    for kind in KINDS:
        if not (tree.root / f"methods/toy_{kind}.py").exists():               # another process has added it, to its own copy
            add(tree, kind)
    python = tree.root / ".venv/bin/python"
    for command in (["tools/check_catalog.py", "--fix"], ["-m", "ruff", "check", "."],
                    ["-m", "pytest", "-q", "-m", "not slow", "tests/test_architecture.py", "tests/test_habits.py"]):
        done = tree.run(str(python), *command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("slug", "said"), [
    ("class", "is a word of Python"), ("tiny", "is a name of the package"), ("", "say which")])
def test_a_slug_that_cannot_be_is_refused_by_the_same_command(tree, slug, said):
    (tree.root / ".venv/paper.bib").write_text(paper("patch", 99))
    before = tree.files()
    done = tree.run("make", "method", f"SLUG={slug}", "ARGS=--name X --kind patch --bibtex .venv/paper.bib")
    assert done.returncode and said in done.stdout + done.stderr and tree.files() == before
