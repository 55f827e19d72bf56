"""The bench: what it measures by worked values, what survives a kill or a failure, and that a record is complete."""
import importlib
import json
import math
import shutil
import subprocess
from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch
from untrained import UNTRAINED, JointEmoji

from accel_tools import bench
from accel_tools.catalog import ROOT, load
from accel_tools.check_catalog import check
from accel_tools.measure import growth, peers, realistic, records, sweep
from accel_tools.measure.arms import Arm, sample_batch
from accel_tools.measure.cells import Cells
from accel_tools.measure.kernels import Roofline, measure, problems
from accel_tools.measure.kernels import work as work_of
from accel_tools.measure.memory import in_fresh_process, peak_allocated, peak_resident
from accel_tools.measure.peers import Peer
from accel_tools.measure.quality import psnr, quality, ssim
from accel_tools.measure.sweep import Bench, Suite, work
from accel_tools.measure.tasks import Task
from accel_tools.measure.timing import breakdown, compare, interleave
from methods import fora

pytestmark = pytest.mark.slow

SMALL = Suite("small", images=6, rounds=2)
ARM_KEYS = {"steps", "latency_s", "latency_spread", "speedup", "macs", "peak_bytes", "cached_bytes", "label_accuracy",
            "recall", "frechet", "n"}


TASK = UNTRAINED["dit"]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make() -> a bench of a random model over one folder of cells, without the subprocess that measures memory."""
    monkeypatch.setattr(sweep, "card", lambda name: {"sha256": "0", "config": {}})
    memory = {"peak_bytes": 2, "peak_resident_bytes": 3, "report": {"state": "engaged", "cached_bytes": 1}}
    monkeypatch.setattr(sweep, "memory_of", lambda model, arm, images: dict(memory))
    return lambda: Bench(TASK, SMALL, Cells(tmp_path / "cells"))


@pytest.fixture
def counted(monkeypatch):
    """Every batch that is sampled, in order: (steps, number of images)."""
    calls = []

    def counting(self, pipe, steps, prompts, **kwargs):
        calls.append((steps, len(prompts)))
        return sample_batch(pipe, steps, prompts, **kwargs)
    monkeypatch.setattr(Task, "draw", counting)
    return calls


# ---- numbers -----------------------------------------------------------------------------------------------------------

def test_psnr_of_a_known_error():
    a = torch.full((2, 1, 16, 16), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20, abs=1e-4) and psnr(a, a) == math.inf


def test_ssim_of_flat_images_compares_their_means():
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), 0.25)
    assert ssim(a, b) == pytest.approx((2 * 0.125 + 1e-4) / (0.25 + 0.0625 + 1e-4), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1)


def test_ssim_of_opposite_checkerboards_compares_their_structure():
    """Both have mean 1/2 and variance 0.01 in every window, and covariance -0.01."""
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 0.2 - 0.1
    a, b = 0.5 + board[None, None], 0.5 - board[None, None]
    assert ssim(a, b) == pytest.approx((-0.02 + 9e-4) / (0.02 + 9e-4), abs=1e-4)


def test_quality_counts_by_class():
    found = quality(torch.rand(20, 1, 32, 32), torch.arange(20) % 5)
    shares = [share for share in found["recall"][:5]]
    assert found["n"] == 20 and found["recall"][5:] == [None] * 5
    assert found["label_accuracy"] == pytest.approx(sum(shares) / 5) and found["frechet"] > 100      # noise is no digit


def test_a_speedup_is_paired_by_round():
    """The machine becomes ten times slower half-way; the ratio stays 2."""
    found = compare([2.0, 2.2, 20.0, 22.0], [1.0, 1.1, 10.0, 11.0])
    assert found["speedup"] == pytest.approx(2) and found["speedup_spread"] == pytest.approx([2, 2])


def test_calls_are_interleaved_and_every_other_round_runs_backwards():
    order = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba" and [len(s) for s in seconds.values()] == [3, 3]


def test_peak_counts_what_is_alive_together():
    def call():
        a = torch.ones(1000)
        del a
        b, c = torch.ones(1000), torch.ones(1000)
        return b + c
    assert 12_000 <= peak_allocated(call) < 14_000


def test_a_fresh_process_starts_from_its_own_peak():
    """Not from the parent's, which getrusage would report."""
    ballast = bytearray(b"x") * (2 * 10 ** 9)
    here, there = peak_resident(), in_fresh_process(peak_resident)
    assert here > len(ballast) > there > 10 ** 7


def test_a_breakdown_names_the_ops():
    ops = breakdown(lambda: torch.ones(300, 300) @ torch.ones(300, 300))
    assert "aten::mm" in {op["op"] for op in ops} and all(op["seconds"] >= 0 for op in ops)


# ---- cells -------------------------------------------------------------------------------------------------------------

def test_a_killed_sweep_continues_and_computes_no_cell_twice(make, counted, monkeypatch):
    wanted = [("fora", {"interval": 2}), ("tome", {"ratio": 0.5})]
    real, images = Bench.images, []

    def killed(self, arm, seed):
        images.append(arm)
        if len(images) == 12:
            raise KeyboardInterrupt
        return real(self, arm, seed)
    with monkeypatch.context() as patched:
        patched.setattr(Bench, "images", killed)
        with pytest.raises(KeyboardInterrupt):
            make().run(wanted, lambda *record: None)
    before = len(counted)
    records = []
    assert make().run(wanted, lambda *record: records.append(record)) == [] and len(counted) > before
    drawn = [call for call in counted if call[1] == 2]                # two images a seed; timing takes one
    fewer = {record["arms"]["fewer_steps"]["steps"] for _, record in records}
    assert len(drawn) == 3 * (1 + len(fewer) + 2)                      # three seeds: plain once, fewer-steps, two methods
    done, again = len(counted), []
    make().run(wanted, lambda *record: again.append(record))
    assert [record["arms"] for _, record in again] == [record["arms"] for _, record in records]
    assert len(counted) == done                                        # a finished sweep samples nothing


def test_a_failing_cell_is_recorded_and_the_sweep_goes_on(make, tmp_path):
    done = []
    failed = make().run([("tome", {"ratio": 7.0}), ("fora", {"interval": 2})], lambda slug, record: done.append(slug))
    assert [line.split(":")[0] for line in failed] == ["tome {'ratio'"] and done == ["fora"]
    error, = (tmp_path / "cells").glob("*.error")
    assert "ratio=7.0 outside [0, 1]" in json.loads(error.read_text())["error"]


def test_an_error_is_forgotten_when_the_cell_succeeds(tmp_path):
    cells, identity = Cells(tmp_path), {"what": "sum"}
    with pytest.raises(ZeroDivisionError):
        cells.numbers(identity, lambda: 1 / 0)
    assert [path.suffix for path in tmp_path.iterdir()] == [".error"] and not cells.has(identity)
    assert cells.numbers(identity, lambda: {"a": [1.5, None]}) == {"a": [1.5, None]} and cells.has(identity)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_other_code_is_another_cell(make, monkeypatch):
    found = make()
    before = found.identity("macs", Arm(4, "tome", {}))
    monkeypatch.setattr(sweep, "code_hash_of", lambda slug: "sha256:other")
    assert found.identity("macs", Arm(4, "tome", {})) != before
    assert found.identity("macs", Arm(4)) == found.identity("macs", Arm(4))


# ---- records -----------------------------------------------------------------------------------------------------------

def test_a_record_is_complete(make, tmp_path):
    record = make().record("fora", {"interval": 2})
    path = records.write("fora", [record], tmp_path)
    written = json.loads(path.read_text())
    assert (written["schema"], written["method"]) == (2, "fora")
    record, = written["records"]
    assert {"model", "config", "arms", "report", "suite", "hardware", "load_average", "versions", "commit", "date", "code_hash",
            "real_vs_real"} == set(record)
    assert record["code_hash"].startswith("sha256:") and record["versions"]["torch"] == torch.__version__
    assert list(record["arms"]) == ["plain", "fewer_steps", "method"]
    for name, arm in record["arms"].items():
        assert set(arm) >= ARM_KEYS and arm["n"] == SMALL.images
        assert ("psnr" in arm and "ssim" in arm) == (name != "plain")
    plain, fewer, method = record["arms"].values()
    assert fewer["macs"] <= method["macs"] < fewer["macs"] + plain["macs"] / TASK.steps
    assert method["macs"] < plain["macs"] and record["report"]["state"] == "engaged"


def test_writing_replaces_records_of_the_same_model_and_config(tmp_path):
    def record(ratio, value):
        return {"model": "dit", "config": {"ratio": ratio}, "value": value}
    records.write("tome", [record(0.3, 1.0), record(0.5, 2.0)], tmp_path)
    path = records.write("tome", [record(0.5, math.inf)], tmp_path)
    assert [r["value"] for r in json.loads(path.read_text())["records"]] == [1.0, None]


def test_realistic_speed_stands_beside_its_bound(tmp_path):
    case = realistic.Case("a model", lambda: realistic.dit(layers=1, width=64, side=16), Arm(1, "todo", {"factor": 2}))
    found = realistic.Realistic(Cells(tmp_path), rounds=2)
    record = found.record(case)
    method = record["arms"]["method"]
    assert method["mac_bound"] == pytest.approx(record["arms"]["plain"]["macs"] / method["macs"]) and method["mac_bound"] > 1
    assert 0 < method["peak_bytes"] <= 1.2 * record["arms"]["plain"]["peak_bytes"]
    assert ("profile" in record) == (method["share_of_bound"] < realistic.ENOUGH)
    assert record["report"]["state"] == "engaged" and record["code_hash"].startswith("sha256:")


def test_the_entries_say_which_runs_are_timed(toy, edit):
    edit("catalog/entries/method_1.yaml", "models:",
         "timing:\n  - {model: dit, steps: 3, config: {ratio: 0.25}, peer: tomesd}\n  - {model: unet_256, steps: 1}\nmodels:")
    first, second = realistic.cases(load(toy))
    assert (first.model, first.arm, first.pixels) == (realistic.MODELS["unet_256"].label, Arm(1, "method_1", {}), 256)
    assert (second.arm, second.peer) == (Arm(3, "method_1", {"ratio": 0.25}), "tomesd")


@pytest.mark.parametrize(("text", "said"), [
    ("{model: dot, steps: 1}", "timing.0: no model of real size 'dot'; did you mean 'dit'?"),
    ("{model: dit, steps: 0}", "timing.0.steps: Input should be greater than or equal to 1"),
    ("{model: dit, steps: 1, peer: tomes}", "timing.0: no package 'tomes'; did you mean 'tomesd'?"),
    ("{model: dit, steps: 1, config: {ration: 1}}", "timing.0.config: Config has no field 'ration'; did you mean 'ratio'?")])
def test_a_run_that_cannot_be_timed_is_told(toy, edit, text, said):
    (toy / "tools/measure").mkdir(parents=True)
    for name in ("realistic", "peers", "tasks"):
        shutil.copy(ROOT / f"tools/measure/{name}.py", toy / "tools/measure")
    edit("catalog/entries/method_1.yaml", "models:", f"timing:\n  - {text}\nmodels:")
    [problem] = [problem for problem in check(toy)[0] if problem.file == "catalog/entries/method_1.yaml"]
    assert problem.message.startswith(said)


def test_every_patch_that_is_timed_is_timed_off_too():
    catalog = load()
    timed = {case.arm.method for case in realistic.cases(catalog)}
    switches = {case.arm.method: case for case in realistic.switches(catalog)}
    assert switches.keys() == timed and len(timed) >= 6
    for slug, case in switches.items():
        module = importlib.import_module(f"methods.{slug}")
        assert case.arm.config and module.Config(**case.arm.config) == module.OFF
        assert (case.make is realistic.small_dit) == any(other.make is realistic.dit for other in realistic.cases(catalog)
                                                         if other.arm.method == slug)


def test_an_off_switch_is_measured_beside_plain_against_plain(tmp_path):
    case = realistic.Case("a model", lambda: realistic.dit(layers=1, width=64, side=16), Arm(1, "todo", {"factor": 1}))
    arms = realistic.Realistic(Cells(tmp_path), rounds=2).overhead(case)["arms"]
    assert list(arms) == ["plain", "method"] and all(arm["overhead"] > -1 for arm in arms.values())


# ---- what is measured --------------------------------------------------------------------------------------------------

def test_the_entries_say_which_configs_are_measured(toy, edit):
    edit("catalog/entries/method_1.yaml", "models:", "bench:\n  dit: [{ratio: 0.25}, {ratio: 0.5, on: true}]\nmodels:")
    catalog = load(toy)
    assert work(catalog, "dit") == [("method_1", {"ratio": 0.25}), ("method_1", {"ratio": 0.5, "on": True}),
                                    ("method_2", {}), ("method_3", {})]
    assert work(catalog, "unet", ["method_1"]) == [("method_1", {})] and work(catalog, "ar") == []


def test_a_refusal_is_told_and_is_no_failure(make):
    plan = bench.Plan(make(), [("deepcache", {}), ("fora", {"interval": 2})], around=True)
    assert plan.work == [("fora", {"interval": 2})] and "no UNet stages" in plan.refused["deepcache"]


def test_the_curve_of_fewer_steps_starts_at_the_plain_run(make, tmp_path):
    baseline = make().baseline()
    assert [arm["steps"] for arm in baseline["curve"]] == [4, 2, 1] and baseline["real_vs_real"]["frechet"] == 1.0
    assert "psnr" not in baseline["curve"][0] and all("psnr" in arm for arm in baseline["curve"][1:])
    assert all(arm["speedup"] > 0 and arm["macs"] > 0 for arm in baseline["curve"]) and "code_hash" not in baseline
    records.write_baseline("dit", {"peers": []}, tmp_path)
    written = json.loads(records.write_baseline("dit", {"plain": baseline}, tmp_path).read_text())
    assert written["model"] == "dit" and written["peers"] == [] and len(written["plain"]["curve"]) == 3


def test_a_package_that_breaks_says_how_and_the_next_is_measured(make, monkeypatch):
    def breaks(pipe):
        pipe.transformer.pos_embed = None
        raise TypeError("not made for this\nat all")

    monkeypatch.setattr(peers, "PEERS", {
        "broken": Peer("torch", breaks), "absent": Peer("no-such-thing", breaks),
        "idle": Peer("torch", lambda pipe: nullcontext()),
        "half": Peer("torch", lambda pipe, **config: fora.apply(pipe, fora.Config(**config)), {"interval": 2})})
    broken, idle, half = make().peers()["runs"]
    assert broken["error"] == "TypeError: not made for this" and "arm" not in broken
    assert idle["error"] == "ValueError: it runs and changes nothing"
    assert half["arm"]["psnr"] < math.inf and half["arm"]["speedup"] > 0 and half["version"] == version("torch")
    assert half["config"] == {"interval": 2} and make().peers()["runs"][2] == half


# ---- the command -------------------------------------------------------------------------------------------------------

def test_models_are_swept_one_after_the_other(monkeypatch, tmp_path, capsys, make):
    """One breaks, the next is still measured; nothing is written by an untimed sweep."""
    monkeypatch.setattr(JointEmoji, "quality", lambda self, images, prompts: 1 / 0)
    monkeypatch.setattr(bench, "TASKS", UNTRAINED)
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "cells")
    monkeypatch.setattr(records, "write", lambda *_: pytest.fail("an untimed sweep has no results"))
    monkeypatch.setattr(records, "write_baseline", lambda *_: pytest.fail("an untimed sweep has no results"))
    assert bench.main(["--model", "mmdit", "dit", "--images", "3", "--method", "fora", "deepcache", "--untimed"]) == 1
    out, err = capsys.readouterr()
    assert "not deepcache: deepcache: this DiT" in out and "minutes in all" in out.split("fora {")[0]
    assert err.count("FAILED") == 2                                    # both configs on mmdit
    assert "fora {'interval': 3} on dit" in out


def test_a_failed_case_fails_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "cases", lambda catalog: [realistic.Case("a model", lambda: 1 / 0, Arm(1, "tome"))])
    assert bench.main(["--realistic", "--dirty"]) == 1 and "FAILED tome" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path):
    """A small repository with one commit."""
    for path in ("methods/a.py", "catalog/results/a.json", "README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_a_tree_is_dirty_when_what_a_number_depends_on_has_changed(checkout, tmp_path_factory):
    for path in ("catalog/results/a.json", "catalog/results/b.json", "README.md", "notes.txt"):
        (checkout / path).write_text("2")
    assert records.changed(checkout) == [] and records.dirty_tree(checkout) is None
    clean = records.commit(checkout)
    assert len(clean) >= 7 and "dirty" not in clean
    for path, told in (("methods/a.py", "in methods/a.py, so"), ("methods/new.py", "in methods/a.py, methods/new.py, so")):
        (checkout / path).write_text("2")
        assert told in records.dirty_tree(checkout) and "commit first, or say --dirty" in records.dirty_tree(checkout)
    assert records.commit(checkout) == f"{clean}-dirty"
    assert records.commit(tmp_path_factory.mktemp("nowhere")) == "unknown"


@pytest.mark.parametrize("flags", [[], ["--suite", "paper"], ["--realistic"], ["--overhead"], ["--plans"], ["--studies"]])
def test_no_result_is_written_from_a_dirty_tree(monkeypatch, capsys, flags):
    monkeypatch.setattr(records, "changed", lambda root: ["a.py", "b.py", "c.py", "d.py"])
    monkeypatch.setattr(bench, "suite", lambda *_: pytest.fail("nothing may run"))
    monkeypatch.setattr(bench, "each_case", lambda *_: pytest.fail("nothing may run"))
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert "the tree differs from its commit in a.py, b.py, c.py and 1 more" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--dirty"], ["--untimed"]])
def test_a_dirty_tree_is_measured_when_told_so_or_nothing_is_written(monkeypatch, flags):
    monkeypatch.setattr(records, "changed", lambda root: ["a.py"])
    ran = []
    monkeypatch.setattr(bench, "suite", lambda *_: ran.append(1) or [])
    assert bench.main(flags) == 0 and ran == [1]


def test_the_catalogue_tools_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(growth, "measure", lambda n: {"entries": n})
    assert bench.main(["--catalog"]) == 0
    assert [json.loads(line)["entries"] for line in capsys.readouterr().out.splitlines()] == [52, 500, 5000]


# ---- kernels -----------------------------------------------------------------------------------------------------------

def test_every_kernel_has_a_problem():
    covered = {problem.op.__module__ for problem in problems("cpu", torch.float32, tokens=64, channels=16, heads=2).values()}
    assert covered == {f"accel_kernels.{path.stem}" for path in (ROOT / "kernels").glob("[a-z]*.py")}


def test_a_roofline_is_the_slower_of_moving_and_computing():
    limit = Roofline(bandwidth=100, flops=1000)
    assert limit.seconds(moved=300, flops=1000) == 3 and limit.seconds(moved=100, flops=5000) == 5


def test_bytes_and_flops_of_an_op_are_those_of_its_shapes():
    """Two batches of 64 tokens of 16 channels: 48 sources, 16 destinations; a score and an index for each source."""
    problem = problems("cpu", torch.float32, tokens=64, channels=16, heads=2)["cosine_match"]
    moved, flops = work_of(problem, "reference")
    assert moved == 4 * 2 * 64 * 16 + 8 * 64 + 2 * 48 * (4 + 8) and flops == 2 * 2 * 48 * 16 * 16


def test_kernels_are_timed_beside_the_roofline():
    rows = list(measure("cpu", ("reference",), tokens=64, channels=16, heads=2, elements=1 << 16, side=64))
    assert len(rows) == 2 * len(problems("cpu", torch.float32, tokens=64, channels=16, heads=2))
    assert all(row["of_roofline"] == pytest.approx(row["roofline"] / row["reference"]) for row in rows)
