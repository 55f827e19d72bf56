"""Tuning: what is tried, what counts as within the budget, nothing measured twice, and a file that puts the answer on."""
import dataclasses
import json
import math

import diffusers
import pytest
import torch
from families import FAMILIES, Family

import methods
from methods._core import tune as tuning
from methods._core.tune import Recipe

DIT = FAMILIES["dit"]
CALLS = [{"class_labels": [1]}, {"class_labels": [2]}, {"class_labels": [3]}]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that depend on the steps and the patches of a run alone, so that no test hangs on a machine's mood."""
    draw = tuning._Judge.draw

    def timed(judge, recipe, number):
        saved = {"fora": 0.5, "tome": 0.9}
        images, _ = draw(judge, recipe, number)
        return images, recipe.steps * math.prod(saved.get(slug, 1.0) for slug, _ in recipe.patches)

    monkeypatch.setattr(tuning._Judge, "draw", timed)


def tuned(pipe, **more):
    some = "fora", "tome", "deepcache"                                 # the last of which refuses
    return methods.tune(pipe, CALLS, **{"steps": 8, "methods": some, "tell": None, "budget": "psnr>=8"} | more)


def test_methods_settings_pairs_and_fewer_steps_are_tried_and_the_fastest_within_the_budget_is_found(clock):
    pipe = DIT.pipe()
    plain = DIT.run(pipe, steps=4)
    found = tuned(pipe)
    assert torch.equal(DIT.run(pipe, steps=4), plain)
    recipes = {point.recipe for point in found.points}
    assert Recipe(8, (("fora", '{"interval": 2}'),)) in recipes and Recipe(6) in recipes
    assert any(len(recipe.patches) == 2 for recipe in recipes)
    assert any(recipe.patches and recipe.steps < 8 for recipe in recipes)
    states = {point.recipe.patches[0][0]: point.state for point in found.points if point.recipe.patches}
    assert states["deepcache"] == "refuses" and states["fora"] == "engaged"
    assert found.best.psnr >= 8 and found.best.speedup >= max(
        (point.speedup for point in found.rivals if point.psnr >= 8), default=1)
    assert "without gain here: deepcache" in str(found) and str(found).startswith("DiTTransformer2DModel, 8 steps, psnr>=8: ")
    beaten = [point for point in found.frontier
              if any(other.speedup >= point.speedup and other.psnr > point.psnr for other in found.frontier)]
    assert not beaten and [p.speedup for p in found.frontier] == sorted(p.speedup for p in found.frontier)


def test_fewer_steps_are_the_answer_where_they_do_better(clock):
    found = tuned(DIT.pipe(), methods=("tome",), budget="speedup>=1.5")
    assert not found.best.recipe.patches and "no method beats fewer steps here" in str(found)


def test_a_budget_that_nothing_keeps_gives_the_plain_run(clock):
    found = tuned(DIT.pipe(), budget="psnr>=200")
    assert found.best.recipe == found.plain == Recipe(8) and "nothing that was tried keeps within the budget" in str(found)


def test_a_milder_setting_that_misses_the_budget_ends_a_method(clock):
    found = tuned(DIT.pipe(), methods=("fora",), budget="psnr>=200")
    assert sum(bool(point.recipe.patches) for point in found.points) == 1


def test_a_distance_of_the_callers_own(clock):
    def mean(images, plain):
        assert images.shape == plain.shape and images.shape[-1] in (1, 3, 4)
        return float((images - plain).abs().mean())

    found = tuned(DIT.pipe(), methods=("fora",), budget="distance<=0.3", distance=mean)
    assert 0 < found.best.distance <= 0.3 and all(point.distance is not None for point in found.frontier)


def test_a_search_that_was_stopped_goes_on_from_its_journal(clock, tmp_path, monkeypatch):
    journal, told = tmp_path / "tuned.jsonl", []

    def stop(line):
        told.append(line)
        if len(told) == 5:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tuned(DIT.pipe(), journal=journal, tell=stop)
    with journal.open("a") as file:
        file.write('{"recipe": {"steps"')                              # cut off while it was written
    again = []
    found = tuned(DIT.pipe(), journal=journal, tell=again.append)
    assert not {line.split(": ", 1)[1] for line in told} & {line.split(": ", 1)[1] for line in again}
    monkeypatch.setattr(tuning._Judge, "__call__", None)                # nothing is measured any more
    assert tuned(DIT.pipe(), journal=journal) == found
    for other in ({"steps": 6}, {"distance": lambda images, plain: 0.0}):
        with pytest.raises(ValueError, match="the journal of another search"):
            tuned(DIT.pipe(), journal=journal, **other)


def test_what_was_found_is_put_on_from_a_file(clock, tmp_path):
    pipe, path = DIT.pipe(), tmp_path / "tuned.json"
    found = tuned(pipe, methods=("fora",))
    by_fora = next(point for point in found.points if point.recipe.patches)
    found = dataclasses.replace(found, best=by_fora)
    found.save(path)
    assert json.loads(path.read_text())["patches"] == [{"method": slug, "config": json.loads(config)}
                                                       for slug, config in found.best.recipe.patches]
    plain = DIT.run(pipe, steps=4)
    with methods.load(pipe, path) as applied:
        DIT.run(pipe, steps=applied.steps)
        assert applied.steps == found.best.recipe.steps
        assert all(report["state"] == "engaged" for report in applied.report().values()) and applied.report().keys() == {"fora"}
    assert torch.equal(DIT.run(pipe, steps=4), plain)
    with pytest.raises(ValueError, match="was tuned on a DiTTransformer2DModel, this is a FluxTransformer2DModel"):
        methods.load(FAMILIES["flux"].pipe(), path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not what tune wrote"):
        methods.load(pipe, path)


def test_a_recipe_goes_on_whole_or_not_at_all():
    pipe = DIT.pipe()
    plain = DIT.run(pipe, steps=3)
    with pytest.raises(ValueError, match="deepcache"):
        Recipe(3, (("fora", "{}"), ("deepcache", "{}"))).applied(pipe)
    assert torch.equal(DIT.run(pipe, steps=3), plain)


@pytest.mark.parametrize("more, said", [
    ({"budget": "psnr<=30"}, "must be one of psnr>=NUMBER"), ({"budget": "fast"}, "must be one of"),
    ({"budget": "distance<=1"}, "needs a function `distance`"), ({"steps": 1}, "two steps or more"),
    ({"methods": ("fora", "no_such")}, "no method can be tried by the name of no_such"),
])
def test_bad_input_is_named_before_any_run(more, said):
    pipe = DIT.pipe()
    Family.model(pipe).forward = None
    with pytest.raises(ValueError, match=said):
        tuned(pipe, **more)


def test_one_call_and_no_pipeline_are_refused():
    with pytest.raises(ValueError, match="two calls or more"):
        methods.tune(DIT.pipe(), CALLS[:1], steps=8, tell=None)
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        methods.tune(diffusers.DDIMScheduler(), CALLS, steps=8, tell=None)


def test_what_refuses_costs_no_run():
    pipe, ran = DIT.pipe(), []
    judge = tuning._Judge(pipe, CALLS, Recipe(2), 0, None)
    judge(Recipe(1), [0])
    Family.model(pipe).register_forward_hook(lambda *args: ran.append(1))
    assert judge(Recipe(2, (("deepcache", "{}"),)), [0]).state == "refuses" and not ran
