"""The example of every method's docstring runs, and so does the README's, and the arithmetic of the first principles."""
import doctest
import importlib
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SLUGS = [path.stem for path in sorted((ROOT / "methods").glob("[a-z]*.py"))]


@pytest.mark.parametrize("slug", SLUGS)
def test_docstring(slug):
    module = importlib.import_module(f"methods.{slug}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


def test_readme():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("path", sorted((ROOT / "catalog/principles").glob("*.md")), ids=lambda path: path.stem)
def test_worked_numbers(path):
    text = path.read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert snippets and all("assert" in snippet for snippet in snippets) and "**Do not use it**" in text
    for snippet in snippets:
        exec(compile(snippet, path.name, "exec"), {})
