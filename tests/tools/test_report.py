"""The page of `make run`, on untrained models of all five kinds."""
import json
import re

import pytest
from untrained import UNTRAINED

from accel_tools import report
from accel_tools.catalog import load
from accel_tools.measure import sweep
from accel_tools.measure.cells import Cells
from accel_tools.measure.sweep import Bench, Suite

CARD = {"sha256": "0", "config": {}}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "card", lambda name: CARD)
    monkeypatch.setattr(report, "TASKS", UNTRAINED)
    monkeypatch.setattr(report, "CURVE", (2, 1))
    monkeypatch.setattr(report, "SUITE", Suite("report", images=2, rounds=2, seeds=(0,)))
    monkeypatch.setattr(report, "OUT", tmp_path)


@pytest.mark.slow
def test_each_method_is_shown_where_its_paper_leads(tmp_path):
    benches = {model: Bench(task, report.SUITE, Cells(tmp_path)) for model, task in UNTRAINED.items()}
    found = report.homes(load(), benches)
    placed = {slug: model for model, methods in found.items() for slug, _ in methods}
    assert len(placed) == sum(map(len, found.values()))                                  # each once
    assert (placed["deepcache"], placed["tome"], placed["fora"], placed["sjd"]) == ("unet", "unet", "dit", "ar")
    assert dict(found["unet"])["deepcache"] == {"interval": 2}                           # the first config of its entry


@pytest.mark.slow
def test_without_the_papers_model_a_method_goes_where_it_works(tmp_path):
    found = report.homes(load(), {"dit": Bench(UNTRAINED["dit"], report.SUITE, Cells(tmp_path))})
    assert "tome" in dict(found["dit"]) and "deepcache" not in dict(found["dit"])


@pytest.mark.slow
def test_the_page_shows_every_model(tmp_path, monkeypatch, capsys):
    few = {"dit": [("fora", {"interval": 2}), ("tome", {"ratio": 7.0})], "unet": [("deepcache", {"interval": 2})],
           "mmdit": [("pfdiff", {"k": 1})], "video_dit": [("tome", {"ratio": 0.5})], "ar": [("sjd", {"window": 8})]}
    monkeypatch.setattr(report, "homes", lambda catalog, benches: few)
    assert report.main(["--model", *UNTRAINED]) == 0
    page = (tmp_path / "index.html").read_text()
    for name in ("FORA", "DeepCache", "PFDiff", "ToMe", "SJD", "2 steps", "moving"):
        assert name in page, name
    assert "Failed: ToMe: ratio=7.0" in page and "5 of 6 methods ran" in page and "<th>saved</th>" in page
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]{100})', page)
    assert len(pictures) == 4 + 4 + 4 + 4 + 2 and len(re.findall("prefers-reduced-motion: reduce", page)) == 4
    assert page.count('<svg class="plot"') == 2 * 4 + 1                    # a decoder has neither PSNR nor a MAC bound
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert list(numbers) == list(UNTRAINED) and all(run["speedup"] > 0 for runs in numbers.values() for run in runs)
    assert (tmp_path / "samples.png").stat().st_size > 500
    drawn = {path.stem for path in (tmp_path / "methods").glob("*.png")}
    assert {"fora", "deepcache", "pfdiff", "tome", "sjd"} <= drawn                # those of the page, and with them
    assert {"cesdi", "stable_flow", "headrouter"} | {"acm", "diff_pruning", "dydit"} <= drawn           # edits, and conversions
    capsys.readouterr()
    assert report.main(["--model", *UNTRAINED]) == 0 and "is up to date" in capsys.readouterr().out
