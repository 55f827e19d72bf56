"""The plots: what they are drawn from, that they read anywhere, and that nothing in them depends on the day or the host."""
import re
import xml.etree.ElementTree as ElementTree

import pytest

from accel_tools.pages.measured import measured, models
from accel_tools.pages.plots import figures, highlighted

NAMES = {"first": "First", "second": "Second"}


def arm(speedup=1.0, macs=100, **more):
    return {"steps": 20, "speedup": speedup, "speedup_spread": [speedup * .9, speedup * 1.1], "macs": macs, **more}


def record(method, model="dit", **more):
    plain = arm(macs=100, retrieval=.9, frechet=5.0, peak_bytes=2 ** 20)
    fewer = arm(2.0, 50, retrieval=.8, frechet=7.0, psnr=20.0, peak_bytes=2 ** 20) | {"steps": 10}
    return {"model": model, "config": {"ratio": .5}, "suite": {"name": "quick", "rounds": 3, "images": 9}, "date": "2026-01-02",
            "hardware": "a core", "commit": "abc", "code_hash": "sha256:1", "real_vs_real": {"frechet": 2.0, "n": 9},
            "arms": {"plain": plain, "fewer_steps": fewer, "method": method}} | more


@pytest.fixture
def results():
    ours = arm(1.5, 60, retrieval=.85, frechet=5.5, psnr=30.0, peak_bytes=3 * 2 ** 20, cached_bytes=2 ** 20)
    return {"first": {"records": [record(ours)]},
            "second": {"records": [record(ours | {"speedup": 1.9}), record(ours, suite={"name": "overhead", "rounds": 1})]}}


@pytest.fixture
def baseline():
    curve = [arm(macs=100, retrieval=.9, frechet=5.0, peak_bytes=2 ** 20),
             arm(1.3, 75, retrieval=.9, frechet=6.0, psnr=25.0) | {"steps": 15},
             arm(2.0, 50, retrieval=.8, frechet=7.0, psnr=20.0) | {"steps": 10}]
    peers = [{"package": "tomesd", "config": {"ratio": .5}, "arm": arm(1.4, 62, frechet=5.6, psnr=29.0, retrieval=.8)},
             {"package": "other", "config": {}, "error": "breaks on this <model>"}]
    return {"model": "dit", "plain": {"curve": curve, "real_vs_real": {"frechet": 3.0, "n": 9}, "date": "2026-01-01"},
            "peers": {"runs": peers}}


def test_a_table_gathers_all_methods_the_curve_and_the_packages(results, baseline):
    found = measured("dit", results, baseline, NAMES, {"first": "sha256:1", "second": "sha256:2"})
    assert [(run.kind, run.label) for run in found.runs] == [
        ("plain", "Unaccelerated"), ("fewer", "15 steps"), ("fewer", "10 steps"), ("method", "First, ratio 0.5"),
        ("method", "Second, ratio 0.5"), ("peer", "tomesd package, ratio 0.5"), ("peer", "other package")]
    assert [run.stale for run in found.of("method")] == [False, True]
    assert found.runs[-1].arm == {"error": "breaks on this <model>"}
    assert found.runs[3].bound == pytest.approx(100 / 60) and found.runs[5].bound == pytest.approx(100 / 62)
    assert found.noise == pytest.approx((.9, 1.1)) and found.real["frechet"] == 3.0 and found.facts["date"] == "2026-01-02"
    assert found.score == "retrieval" and models(results, ["unet"]) == ["unet", "dit"]


def test_without_a_curve_the_fewer_steps_of_the_methods_stand_in(results):
    found = measured("dit", results, None, NAMES)
    assert [(run.kind, run.arm["steps"]) for run in found.of("plain", "fewer")] == [("plain", 20), ("fewer", 10)]


def test_a_package_measured_in_a_record_has_a_run_of_its_own(results):
    results["first"]["records"][0] |= {"peer": {"package": "tomesd"}}
    results["first"]["records"][0]["arms"]["tomesd"] = arm(1.2, mac_bound=1.5)
    run, = measured("dit", results, None, NAMES).of("peer")
    assert (run.name, run.bound) == ("tomesd package", 1.5)


def test_each_plot_is_sound_and_every_run_is_named(results, baseline):
    plots = figures(measured("dit", results, baseline, NAMES))
    assert list(plots) == ["pareto-retrieval", "pareto-frechet", "pareto-psnr", "bound", "memory"]
    for name, plot in plots.items():
        root = ElementTree.fromstring(plot)
        texts = {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"First 0.5", "Second 0.5"} <= texts, name                                        # text is text
        assert root.get("role") == "img" and root.get("aria-label") in texts
        assert {"0", "0.0"} & texts, name                                                     # an axis begins at zero
    assert "other package" not in "".join(plots.values()) and "real against real" in plots["pareto-frechet"]
    assert "3 MiB, 1 cached" in plots["memory"]


def test_what_loses_to_fewer_steps_is_pale_and_named_where_one_points(results, baseline):
    results["first"]["records"][0]["arms"]["method"] |= {"psnr": 10.0}
    plot = figures(measured("dit", results, baseline, NAMES))["pareto-psnr"]
    texts = {"".join(element.itertext()).strip() for element in ElementTree.fromstring(plot).iter("{http://www.w3.org/2000/svg}text")}
    assert "First 0.5" not in texts and "Second 0.5" in texts and "<title>First 0.5</title>" in plot
    mark = plot[plot.index('class="run run-first"'):]
    assert "opacity: 0.4" in mark[:mark.index("run-second")]


def test_one_method_can_stand_out(results, baseline):
    plot = figures(measured("dit", results, baseline, NAMES))["bound"]
    assert plot.count('class="run run-first"') == 3 and "run-second" in plot                    # its mark, its spread, its name
    shown = highlighted(plot, "first")
    assert shown.count('class="here"') == 3 and "run-first" not in shown
    assert shown.count("run-second") == plot.count("run-second")


def test_lines_and_text_take_the_colour_of_the_page(results, baseline):
    for plot in figures(measured("dit", results, baseline, NAMES)).values():
        colours = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(href|url\()"?#\w+', "", plot)))
        assert colours <= {"#2f86d1", "#d9762b"} and "currentColor" in plot and "<style" not in plot


def test_equal_numbers_give_equal_bytes_and_unique_ids(results, baseline):
    first, again = (figures(measured("dit", results, baseline, NAMES)) for _ in range(2))
    assert first == again
    ids = [name for plot in first.values() for name in re.findall(r'\bid="([^"]+)"', plot)]
    assert len(ids) == len(set(ids))


def test_nothing_timed_means_nothing_to_plot(results):
    for record_ in (each for result in results.values() for each in result["records"]):
        for each in record_["arms"].values():
            each.pop("speedup", None)
            each.pop("peak_bytes", None)
    assert figures(measured("dit", results, None, NAMES)) == {}


def test_a_config_of_lists_and_mappings_is_not_spelled_out_in_a_plot(results, baseline):
    results["first"]["records"][0]["config"] = {"ratio": 0.25, "tiers": {"q": [[9, 9, 8]]}, "plan": [0, 1, 2]}
    found = measured("dit", results, baseline, NAMES, {})
    drawn = "".join(figures(found).values())
    assert "First 0.25" in drawn and "[9" not in drawn
    assert "First, ratio 0.25, tiers (1 values), plan [0, 1, 2]" in [run.label for run in found.runs]
