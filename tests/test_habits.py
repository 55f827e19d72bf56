"""What is told in several places is the same there, and hosted and local checks name commands that exist."""
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from accel_tools.catalog import load

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]


def test_version_changelog_and_citation_agree():
    version, released = re.search(r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", CHANGELOG, re.M).groups()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["project"]["version"] == citation["version"] == version
    assert str(citation.get("date-released", "unreleased")) == released


def test_the_changelog_need_not_be_edited_for_a_method():
    for entry in load().entries.values():
        assert not re.search(rf"(?<![\w-]){re.escape(entry.name)}(?![\w-])", CHANGELOG), f"{entry.name} is told by its entry"


def test_what_is_typed_says_so_where_it_is_installed():
    for package, folder in (("methods", "methods"), ("accel_kernels", "kernels")):
        assert (ROOT / folder / "py.typed").exists()
        assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


def test_every_package_is_installed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for folder in ("methods", "kernels", "tools")
             for path in (ROOT / folder).rglob("*.py")}
    names = {re.sub("^tools", "accel_tools", re.sub("^kernels", "accel_kernels", name)) for name in found}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


@pytest.mark.parametrize("hook", [hook for repo in HOOKS for hook in repo["hooks"]], ids=lambda hook: hook["id"])
def test_a_hook_runs_what_make_check_runs(hook):
    command = hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude")
    assert command in (ROOT / "Makefile").read_text().split("check: $(TESTS)")[1].split("\n\n")[0]
    assert hook["language"] == "system" and re.compile(hook.get("files", ""))


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_a_workflow_runs_what_exists(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True] and workflow["jobs"]                        # YAML takes `on` for true
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] and job["steps"]
        for step in job["steps"]:
            for target in re.findall(r"^make (\S+)", step.get("run", ""), re.M):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"make {target}"
