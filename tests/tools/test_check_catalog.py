"""The checker: each rule that ties code to entries, the output forms, --fix, and stale results."""
import json
import subprocess
import sys

import pytest

from accel_tools import check_catalog
from accel_tools.catalog import ROOT
from accel_tools.catalog.code_hash import code_hash
from accel_tools.check_catalog import check
from accel_tools.measure.growth import measure

MODULE = "methods/method_2.py"
ENTRY = "catalog/entries/method_2.yaml"
TEST = "tests/methods/test_method_2.py"


def found(root) -> list[str]:
    return [str(problem) for problem in check(root)[0]]


def test_toy_is_sound(toy):
    assert found(toy) == []


@pytest.mark.parametrize(("file", "old", "new", "expected"), [
    pytest.param(MODULE, "Method 2 - Made-up", "Method 2 - Made", f"{MODULE}:1: docstring must begin with", id="title"),
    pytest.param(MODULE, "Idea: tokens", "Tokens", f"{MODULE}:17: docstring: the part 'Idea' is missing", id="idea"),
    pytest.param(MODULE, "Map\n", "Mapping\n", f"{MODULE}:17: docstring: the part 'Map' is missing", id="no map"),
    pytest.param(MODULE, "Departures\n", "", "docstring: the part 'Departures' is missing", id="departures"),
    pytest.param(MODULE, "    >>> 1 + 1\n    2\n", "", "docstring: the part 'Example' is missing", id="example"),
    pytest.param(MODULE, "alike    merge_0", "alike    merge_x",
                 f"{MODULE}:8: Map: merge_x is not defined; did you mean 'merge_", id="map"),
    pytest.param(MODULE, "alike    merge_0", "alike    merge_0, Config.size", "8: Map: Config.size is not", id="field"),
    pytest.param(MODULE, "alike    merge_0", "alike    methods.method_1.nothing", "Map: methods.method_1.nothing is not",
                 id="map of nothing elsewhere"),
    pytest.param(MODULE, "    Eq. 0    keep what is alike    merge_0\n    Alg. 1   the whole             apply\n",
                 "    apply\n", f"{MODULE}:7: Map: its columns", id="map without columns"),
    pytest.param(MODULE, "    return merge_0", "    print(model)\n    return merge_0", "print() is left in", id="print"),
    pytest.param(MODULE, "    return merge_0", "    breakpoint()\n    return merge_0", "breakpoint() is left", id="breakpoint"),
    pytest.param(MODULE, "from dataclasses", "import triton\nfrom dataclasses", "18: imports triton; only", id="triton"),
    pytest.param(MODULE, "    return merge_0", "    from diffusers import X\n    return merge_0", "imports diffusers; a patch",
                 id="diffusers"),
    pytest.param(MODULE, "OFF = ", "\n" * 400 + "OFF = ", f"{MODULE}:301: has ", id="length"),
    pytest.param(MODULE, '"""Method 2', '"Method 2"\nX = """', "the part 'Idea' is missing", id="docstring of a line"),
    pytest.param(MODULE, "def apply(model: list,", "def apply(model,", ": apply: say the type of model", id="argument's type"),
    pytest.param(MODULE, ") -> float:", "):", "merge_0: say the type of what it returns", id="result's type"),
    pytest.param(TEST, "contract.cases", "print", f"{TEST}:1: does not call the contract", id="contract"),
    pytest.param(TEST, "from contracts import patch as contract", "import numpy as contract", "does not call the contract",
                 id="other contract"),
    pytest.param(TEST, "    assert", "    print(1)\n    assert", f"{TEST}:7: print() is left in", id="print in the test"),
    pytest.param(TEST, "def ", "def def ", f"{TEST}:6: does not parse", id="syntax of the test"),
    pytest.param(MODULE, "arXiv 2024.", "ICLR 2025.", "second paragraph of the docstring must be", id="venue"),
    pytest.param(MODULE, "arXiv:2001.10002", "arXiv:2001.10003", "second paragraph of the docstring", id="arxiv"),
    pytest.param(MODULE, "owner/method2", "owner/method3", "second paragraph of the docstring must be", id="code"),
    pytest.param(MODULE, "Given Family2 et al.", "Given Family3 et al.", "second paragraph", id="first author"),
    pytest.param(MODULE, "def apply(", "def put_on(", "a method of kind patch must define 'apply'", id="verb"),
    pytest.param(MODULE, "class Config:", "class Options:", "must define 'Config'", id="config"),
    pytest.param(MODULE, "OFF =", "NONE =", "must define 'OFF'", id="off"),
    pytest.param(MODULE, "0.5       # r, Sec. 3", "0.5", f"{MODULE}:23: Config.ratio needs a comment", id="comment"),
    pytest.param(MODULE, "# of the draw, Sec. 3", "#", f"{MODULE}:24: Config.seed needs a comment", id="empty comment"),
    pytest.param(MODULE, "from dataclasses", "from methods import method_1\nfrom dataclasses",
                 "imports methods.method_1; catalog/entries/method_2.yaml must list it under builds_on", id="import"),
    pytest.param(MODULE, "from dataclasses", "from .method_1 import apply as a\nfrom dataclasses",
                 "must list it under builds_on", id="relative import"),
    pytest.param(MODULE, "    return merge_0", "    import methods.method_1\n    return merge_0",
                 "must list it under builds_on", id="import in a function"),
    pytest.param(MODULE, "from dataclasses", "from accel_kernels.match import match\nfrom dataclasses",
                 f"{MODULE}:18: imports the kernel 'match', but kernels/_triton/match.py is missing", id="kernel"),
    pytest.param(MODULE, "from dataclasses", "from accel_kernels import match\nfrom dataclasses",
                 "but tests/kernels/test_match.py is missing", id="kernel module"),
    pytest.param(MODULE, "def apply(", "def apply(:", f"{MODULE}:", id="syntax"),
    pytest.param(MODULE, "OFF = ", "# FILL: more\nOFF = ", f"{MODULE}:27: fill in: more", id="still to write"),
    pytest.param(ENTRY, "kind: patch", "kind: decoder\nclaims: [passes]", "of kind decoder must define 'generate'", id="kind"),
    pytest.param(ENTRY, "kind: patch", "kind: patch\npending: true", f"{ENTRY}:4: pending: remove this", id="pending"),
    pytest.param("TOKEN-WISE.md", "[2]", "[ 2]", "TOKEN-WISE.md:1: is stale; run", id="list"),
    pytest.param("catalog/schema.json", "{", "{ ", "catalog/schema.json:1: is stale; run", id="schema"),
    pytest.param("README.md", "<!-- list:begin -->", "", "README.md:1: README.md: needs exactly one", id="markers"),
])
def test_each_rule(toy, edit, file, old, new, expected):
    edit(file, old, new)
    assert any(expected in text for text in found(toy)), found(toy)


def test_results_of_an_entry_that_is_not_sound_are_not_said_to_have_none(toy, edit):
    results = toy / "catalog/results"
    results.mkdir(exist_ok=True)
    (results / "method_2.json").write_text("{}")
    (results / "lonely.json").write_text("{}")
    edit(ENTRY, "kind: patch", "kind: pach")
    texts = found(toy)
    assert [text for text in texts if "there is no" in text] == [
        "catalog/results/lonely.json:1: there is no catalog/entries/lonely.yaml"]
    assert any(text.startswith(ENTRY) and "got 'pach'" in text for text in texts)


def test_three_files_belong_together(toy):
    (toy / "methods/method_1.py").unlink()
    (toy / "tests/methods/test_method_2.py").unlink()
    (toy / "methods/lonely.py").write_text("")
    (toy / "tests/methods/test_strayed.py").write_text("")
    texts = found(toy)
    for expected in (
        "catalog/entries/method_1.yaml:1: methods/method_1.py is missing; write it, or set pending: true",
        "tests/methods/test_method_1.py:1: methods/method_1.py is missing",
        "methods/method_2.py:1: tests/methods/test_method_2.py is missing",
        "methods/lonely.py:1: there is no catalog/entries/lonely.yaml",
        "tests/methods/test_strayed.py:1: there is no catalog/entries/strayed.yaml",
    ):
        assert expected in texts


def test_a_map_may_lead_out_of_its_module(toy, edit):
    (toy / "methods/_core").mkdir()
    (toy / "methods/_core/plan.py").write_text("class Plan:\n    def drop(self):\n        pass\n")
    edit(MODULE, "from dataclasses", "from methods._core import plan\nfrom dataclasses")
    edit(MODULE, "alike    merge_0", "alike    plan.Plan.drop, methods._core.plan, methods._core.plan.Plan, Config.ratio")
    assert found(toy) == []
    edit(MODULE, "plan.Plan.drop", "plan.Plan.keep")
    assert found(toy) == [f"{MODULE}:8: Map: plan.Plan.keep is not defined; allowed: Config, Config.ratio, Config.seed, OFF, "
                          + ", ".join(["apply", *sorted(f"merge_{j}" for j in range(12))])]


def test_everything_is_told_in_one_round(toy, edit):
    """Also where the entry is not finished: its name, kind and paper are enough to check module and test."""
    edit(ENTRY, "kind: patch", 'summary: "FILL: what it does"\nkind: patch')
    edit(ENTRY, 'summary: "A made', 'summary_: "A made')
    edit(ENTRY, "notes:", "note:")
    edit(MODULE, "Method 2 - ", "Method Two - ")
    edit(MODULE, "# r, Sec. 3", "")
    edit(TEST, "contract.cases", "len")
    edit("catalog/entries/method_1.yaml", "models:", "models: [venus]\nmodel:")
    edit("methods/method_1.py", "def apply", "def put_on")
    files = [text.split(":")[0] for text in found(toy)]
    assert files == ["catalog/entries/method_1.yaml", *[ENTRY] * 3, *["methods/method_1.py"] * 2, MODULE, MODULE, TEST]


def test_a_broken_entry_hides_no_syntax(toy, edit):
    (toy / ENTRY).write_text("name: [")
    edit(MODULE, "def apply(", "def apply(:")
    edit(TEST, "contract.cases", "len")
    assert [text.split(":")[0] for text in found(toy)] == [ENTRY, MODULE]


def test_a_method_may_be_a_package(toy):
    (toy / "methods/method_2").mkdir()
    (toy / MODULE).rename(toy / "methods/method_2/__init__.py")
    assert found(toy) == []


def test_builds_on_allows_the_import(toy, edit):
    edit(MODULE, "from dataclasses", "from methods import method_1\nfrom dataclasses")
    edit(ENTRY, "builds_on: []", "builds_on: [method_1]")
    assert found(toy) == []


def test_fix_renders_and_changes_nothing_else(toy, edit, capsys):
    edit(ENTRY, "name: Method 2", "name: Renamed")
    edit(MODULE, "Method 2 - ", "Renamed - ")
    sources = {path: path.read_bytes() for path in toy.rglob("*.[py]*") if path.suffix in (".py", ".yaml")}
    assert check_catalog.main(["--root", str(toy)]) == 1
    assert check_catalog.main(["--root", str(toy), "--fix"]) == 0
    assert "re-rendered TOKEN-WISE.md" in capsys.readouterr().out
    assert sources == {path: path.read_bytes() for path in sources}
    assert found(toy) == []


def test_fix_does_not_render_a_broken_catalogue(toy, edit):
    edit(ENTRY, "name: Method 2", "name: ''")
    before = (toy / "TOKEN-WISE.md").read_bytes()
    assert check_catalog.main(["--root", str(toy), "--fix"]) == 1
    assert (toy / "TOKEN-WISE.md").read_bytes() == before


def test_forms_of_output(toy, edit, capsys):
    edit(ENTRY, "kind: patch", "kind: pach")
    arguments = ["--root", str(toy), "--format"]
    assert check_catalog.main([*arguments, "json"]) == 1
    [problem] = json.loads(capsys.readouterr().out)
    assert (problem["file"], problem["line"], problem["level"]) == (ENTRY, 3, "error")
    assert check_catalog.main([*arguments, "github"]) == 1
    assert capsys.readouterr().out.startswith(f"::error file={ENTRY},line=3::kind: Input should be")
    assert check_catalog.main([*arguments, "text"]) == 1
    assert capsys.readouterr().out.startswith(f"{ENTRY}:3: kind:")


def test_json_of_a_sound_catalogue_is_an_empty_list(toy, capsys):
    assert check_catalog.main(["--root", str(toy), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


# ---- results and what is measured -----------------------------------------------------------------------------------

def test_stale_results_warn_and_do_not_fail(toy, edit, capsys):
    results = toy / "catalog/results"
    results.mkdir()
    (results / "method_2.json").write_text(json.dumps({"runs": [{"code_hash": code_hash("method_2", toy)}]}))
    assert found(toy) == []
    edit("catalog/results/method_2.json", "{", '{"commit": "abc-dirty", ')
    [told] = found(toy)
    assert told.startswith("catalog/results/method_2.json:1: measured from a tree that was not committed")
    edit(MODULE, "float = 0.5", "float = 0.6")
    assert check_catalog.main(["--root", str(toy)]) == 0
    out = capsys.readouterr().out
    assert "catalog/results/method_2.json:1: warning: measured with other code" in out and "1 warnings" in out
    (results / "method_9.json").write_text("{}")
    (results / "method_1.json").write_text("{")
    assert check_catalog.main(["--root", str(toy)]) == 1


def test_what_is_to_be_measured_names_models_and_config_fields(toy, edit):
    line = edit("catalog/entries/method_1.yaml", "models:", "bench:\n  dit: [{sharpness: 2}]\n  lit: [{}]\nmodels:")
    (toy / "tools/measure").mkdir(parents=True)
    (toy / "tools/measure/tasks.py").write_text('TASKS: dict = {"dit": 1, "unet": 2}\n')
    out = found(toy)
    assert out == [f"catalog/entries/method_1.yaml:{line + 1}: bench.dit.0: Config has no field 'sharpness'; "
                   "allowed: ratio, seed",
                   f"catalog/entries/method_1.yaml:{line + 2}: bench: no bundled model 'lit'; did you mean 'dit'?"]


# ---- the real catalogue ------------------------------------------------------------------------------------------

def test_real_catalogue_passes():
    assert [str(problem) for problem in check(ROOT)[0] if problem.level == "error"] == []


def test_real_check_is_quick_and_needs_no_torch():
    code = "import sys, time; from accel_tools.check_catalog import check; check(); print(time.process_time());" \
           "assert 'torch' not in sys.modules and 'methods' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert float(out) < 2


def test_bench_measures_a_sound_catalogue():
    assert measure(5)["problems"] == 0
