"""The studies, as small as they can be, and what becomes of them in a file and on a page."""
from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from accel_tools.catalog import load
from accel_tools.measure import cesdi, dato, records, spectrum, studies, titok, tome_binding
from accel_tools.measure.arms import offering
from accel_tools.measure.sweep import work
from accel_tools.measure.tasks import TASKS
from methods._core.denoiser import describe

pytestmark = pytest.mark.slow


@pytest.fixture
def short(monkeypatch):
    for module in (dato, tome_binding):
        monkeypatch.setattr(module, "TASK", dataclasses.replace(module.TASK, steps=4))


def test_a_plan_search_lists_what_it_found_beside_the_released_plan_and_fewer_steps(short, tmp_path, capsys):
    found = dato.study(tmp_path, population=2, generations=2, images=1, held_out=1, fewer=(2,))
    plans = [row for row in found["rows"] if row[0].isdigit()]
    assert plans and all(len(row) == len(found["columns"]) and len(row[0]) == 4 for row in plans)
    assert [row[0].split(",")[0] for row in found["rows"][len(plans):]] == ["released plan", "fewer steps"]
    # What was counted for a plan at once is what the sum over its steps said during the search.
    said = {line.split()[6]: float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()}
    for plan, speedup, *_ in plans:
        assert 1 / speedup == pytest.approx(said[plan], abs=1e-3)
    again = dato.study(tmp_path, population=2, generations=2, images=1, held_out=1, fewer=(2,))
    assert again["rows"] == found["rows"] and not capsys.readouterr().out                # nothing is searched twice


def test_phrases_share_their_noun_with_others():
    found = tome_binding.families()
    assert found["green apple"] == ["red apple", "green apple"]
    assert "apple" not in found and all(len(family) > 1 and phrase in family for phrase, family in found.items())


def test_binding_is_judged_among_names_with_the_same_noun(short, tmp_path, monkeypatch):
    monkeypatch.setattr(tome_binding, "families", lambda: {"green apple": ["red apple", "green apple"]})
    found = tome_binding.study(tmp_path, samples=1)
    assert [row[0] for row in found["rows"]] == ["Unedited prompt", "Tokens merged", "Tokens merged, tuned and refined"]
    assert all(row[1] in (0, 1) and row[2] == 1 for row in found["rows"])


def test_positions_of_a_phrase_count_the_pieces_of_its_words():
    tokenizer = tome_binding.TASK.load().tokenizer
    arm = tome_binding.binding_arms("evergreen tree", tokenizer, tokens=256)["Tokens merged"]
    assert arm.config["objects"] == (((3,), (1, 2)),) and arm.config["length"] == 3


@pytest.fixture
def one_tokenizer(monkeypatch, tmp_path):
    """A small tokenizer with what training leaves of it, and squares in place of digits."""
    method = titok.titok
    config = dataclasses.replace(method.TINY, size=32, channels=1, patch=4, codes=5, proxy_depth=16, proxy_codes=4, classes=10)
    x = torch.rand(1040, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    monkeypatch.setattr(titok.digits, "split", lambda held_out: (2 * x - 1, torch.arange(1040) % 10))
    for module in (method, titok):
        monkeypatch.setattr(module, "TRAINED", {"small": config})
    monkeypatch.setattr(titok, "SAMPLES", 20)
    monkeypatch.setattr(titok, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(titok.methods, "weights", lambda name: tmp_path / f"{name}.safetensors")
    model = method.build(config)
    for stage, part in ((0, None), (1, "pixels"), (2, "generator")):
        for weight in method.enter(model, part) if part else ():
            weight.data += 0.01
        torch.save({"averaged": model.state_dict()}, tmp_path / f"small-{stage}.ckpt")
    method.save(model.requires_grad_(True), tmp_path / "small.safetensors")
    return model, tmp_path / "small-1.ckpt"


def test_tokenizers_are_compared_before_and_after_they_are_tuned(one_tokenizer):
    model, _ = one_tokenizer
    found = titok.study(None)
    grid, small = found["rows"]
    assert len(grid) == len(small) == len(found["columns"]) and grid[:4] == ["4 means of patches", 64, 128, None]
    assert small[:3] == ["small", 3, 9] and small[3] != small[4] > 0 and all(0 <= share <= 1 for share in small[6:10])
    images = titok.digits.split(held_out=True)[0][1000:]
    with torch.no_grad():
        painted = model.decode(model.encode(images).index).clamp(-1, 1)
    assert small[4] == pytest.approx(float((painted - images).square().mean()) / 4, rel=1e-4)


def test_an_encoder_that_moved_is_found_out(one_tokenizer):
    model, tuned = one_tokenizer
    model.codes.data += 1e-3
    torch.save({"averaged": model.state_dict()}, tuned)
    with pytest.raises(RuntimeError, match="tuning small on pixels changed codes, decoder, generator, pixels, proxy"):
        titok.study(None)


def test_an_edit_is_held_against_drawing_again(monkeypatch, tmp_path):
    monkeypatch.setattr(cesdi, "TASK", dataclasses.replace(cesdi.TASK, steps=4))
    monkeypatch.setattr(cesdi, "ROUNDS", 1)
    monkeypatch.setattr(cesdi, "pairs", lambda: [("red apple", "green apple")])
    again, found, given = cesdi.study(tmp_path)["rows"]
    assert again[:2] == ["drawn again", 1] and 0 < given[1] < 1 and given[3] > again[3]


def test_what_edits_beside_an_original_is_in_no_sweep():
    edits = offering("PROMPTS")
    assert {"cesdi", "stable_flow", "headrouter"} <= edits.keys()
    assert not edits.keys() & {slug for slug, _ in work(load(), "mmdit")}


def test_every_study_is_found_by_its_file(monkeypatch, tmp_path):
    assert {module.__name__.rpartition(".")[2] for module in (dato, tome_binding, titok)} <= offering("study").keys()
    assert len(offering("study")) < 10
    monkeypatch.setattr(titok, "study", lambda folder: {"model": "digits", "title": str(folder)})
    found = studies.study("titok", tmp_path)
    assert (found["model"], found["title"]) == ("digits", str(tmp_path)) and found["code_hash"].startswith("sha256:")


def test_a_study_stands_beside_the_records_of_its_method(tmp_path):
    records.write("dato", [{"model": "unet", "config": {}, "arms": {}}], tmp_path)
    path = records.write_study("dato", {"title": "T", "rows": [["a", 1 / 3]]}, tmp_path)
    records.write("dato", [{"model": "unet", "config": {"alpha": 0.2}, "arms": {}}], tmp_path)
    written = json.loads(path.read_text())
    assert written["study"]["rows"] == [["a", 0.33333]] and len(written["records"]) == 2


def test_forecasts_and_reuse_run_the_blocks_in_the_same_steps(monkeypatch, tmp_path):
    task = TASKS["dit"]
    pipe, ran = task.load(), {}
    for name, arm in spectrum.arms(task, 4).items():
        passes = []
        layer = describe(pipe.transformer).blocks[0].attn.to_q
        hook = layer.register_forward_hook(lambda *args, passes=passes: passes.append(1))
        with arm.applied(pipe):
            task.sample(pipe, task.steps, task.prompts(1))
        hook.remove()
        ran[name] = len(passes)
    assert set(ran.values()) == {2 + 4} and len(ran) == 6
    monkeypatch.setattr(spectrum, "INTERVALS", (2, 6))
    monkeypatch.setattr(spectrum, "bundled", lambda: ["dit"])
    found = spectrum.study(tmp_path, images=2)
    near, far = found["rows"]
    assert near[3] > near[2] and min(near[2:]) > max(far[2:]) and len(found["columns"]) == len(near)
