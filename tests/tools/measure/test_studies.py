"""The two studies, as small as they can be, and what becomes of them in a file and on a page."""
from __future__ import annotations

import dataclasses
import json

import pytest

from accel_tools.measure import records, studies


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(studies, "TASK", dataclasses.replace(studies.TASK, steps=4))


def test_a_plan_search_lists_what_it_found_beside_the_released_plan_and_fewer_steps(short, tmp_path, capsys):
    found = studies.plan_search(tmp_path, population=2, generations=2, images=1, held_out=1, fewer=(2,))
    plans = [row for row in found["rows"] if row[0].isdigit()]
    assert plans and all(len(row) == len(found["columns"]) and len(row[0]) == 4 for row in plans)
    assert [row[0].split(",")[0] for row in found["rows"][len(plans):]] == ["released plan", "fewer steps"]
    # What was counted for a plan at once is what the sum over its steps said during the search.
    said = {line.split()[6]: float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()}
    for plan, speedup, *_ in plans:
        assert 1 / speedup == pytest.approx(said[plan], abs=1e-3)
    again = studies.plan_search(tmp_path, population=2, generations=2, images=1, held_out=1, fewer=(2,))
    assert again["rows"] == found["rows"] and not capsys.readouterr().out                # nothing is searched twice


def test_phrases_share_their_noun_with_others():
    found = studies.families()
    assert found["green apple"] == ["red apple", "green apple"]
    assert "apple" not in found and all(len(family) > 1 and phrase in family for phrase, family in found.items())


def test_binding_is_judged_among_names_with_the_same_noun(short, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "families", lambda: {"green apple": ["red apple", "green apple"]})
    found = studies.prompt_binding(tmp_path, samples=1)
    assert [row[0] for row in found["rows"]] == ["Unedited prompt", "Tokens merged", "Tokens merged, tuned and refined"]
    assert all(row[1] in (0, 1) and row[2] == 1 for row in found["rows"])


def test_positions_of_a_phrase_count_the_pieces_of_its_words():
    tokenizer = studies.TASK.load().tokenizer
    arm = studies.binding_arms("evergreen tree", tokenizer, tokens=256)["Tokens merged"]
    assert arm.config["objects"] == (((3,), (1, 2)),) and arm.config["length"] == 3


def test_a_study_stands_beside_the_records_of_its_method(tmp_path):
    records.write("dato", [{"model": "unet", "config": {}, "arms": {}}], tmp_path)
    path = records.write_study("dato", {"title": "T", "rows": [["a", 1 / 3]]}, tmp_path)
    records.write("dato", [{"model": "unet", "config": {"alpha": 0.2}, "arms": {}}], tmp_path)
    written = json.loads(path.read_text())
    assert written["study"]["rows"] == [["a", 0.33333]] and len(written["records"]) == 2
