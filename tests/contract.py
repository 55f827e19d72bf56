"""What every method of kind `patch` must show, on every family it works on. Each check takes a `Case`.

A test file runs them all:

    @pytest.mark.parametrize("check, case", contract.cases(tome, tome.Config(ratio=0.5)), ids=contract.name)
    def test_contract(check, case):
        check(case)
"""
from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import threading
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from families import FAMILIES, Family

from accel_tools.macs import count_macs

COMPATIBILITY = Path(__file__).parents[1] / "catalog/compatibility.json"
STEPS = 5


ENGAGING = {                # where the default leaves the families' models of random weights, given embeddings, alone
    "highlight_diffusion": {"threshold": 0.8, "widen": 0, "margin": 0, "words": (4,)}}


def slug(method: ModuleType) -> str:
    return method.__name__.removeprefix("methods.")


def engaging(method: ModuleType) -> Any:
    """A configuration that does something on the families: the default, where that does."""
    return method.Config(**ENGAGING.get(slug(method), {}))


@dataclass(frozen=True)
class Case:
    """A method with an engaging configuration, on one family."""

    method: ModuleType
    config: Any
    family: Family

    def __str__(self) -> str:
        return self.family.name

    def run(self, pipe: Any, **setting) -> torch.Tensor:
        return self.family.run(pipe, **{"steps": STEPS} | setting)

    def model(self, pipe: Any) -> torch.nn.Module:
        return getattr(pipe, "unet", None) or pipe.transformer

    def once(self, **setting) -> torch.Tensor:
        """One patched run on an untouched pipeline."""
        pipe = self.family.pipe()
        with self.method.apply(pipe, self.config):
            return self.run(pipe, **setting)


@cache
def plain(family: str, **setting) -> torch.Tensor:
    return FAMILIES[family].run(FAMILIES[family].pipe(), **{"steps": STEPS} | setting)


def working(method: ModuleType) -> list[Family]:
    """The families on which the committed table says the method works; tests/test_compatibility.py holds it true."""
    table = json.loads(COMPATIBILITY.read_text()).get(slug(method))
    if table is None:
        raise LookupError(f"no row for {slug(method)} in {COMPATIBILITY.name}: run pytest tests/test_compatibility.py --update")
    return [FAMILIES[name] for name, entry in table.items() if entry["works"]]


def cases(method: ModuleType, config: Any) -> list[tuple]:
    """Every check on every family the method works on; on SDXL, which has no attention at full resolution, a level down."""
    found = [Case(method, config, family) for family in working(method)]
    if hasattr(config, "max_downsample") and all(case.family.name != "sdxl" for case in found):
        found.append(Case(method, replace(config, max_downsample=2), FAMILIES["sdxl"]))
    return [(check, case) for check in CHECKS for case in found]


def name(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)


# ---- the checks --------------------------------------------------------------------------------------------------------

def off_is_the_identity(case: Case) -> None:
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.method.OFF) as patch:
        assert torch.equal(case.run(pipe), plain(case.family.name))
        assert patch.report()["state"] == "off"


def on_changes_the_result_and_costs_less(case: Case) -> None:
    pipe, runs = case.family.pipe(), []
    before = count_macs(lambda: runs.append(case.run(pipe)))
    with case.method.apply(pipe, case.config) as patch:
        after = count_macs(lambda: runs.append(case.run(pipe)))
        assert patch.report()["state"] == "engaged"
    expected, out = runs
    assert out.isfinite().all() and not torch.equal(out, expected)
    assert after < before


def removal_restores_every_bit(case: Case) -> None:
    pipe = case.family.pipe()
    case.run(pipe, steps=1)                                      # some models note things about their first call
    attributes = {part: sorted(vars(module)) for part, module in case.model(pipe).named_modules()}
    patch = case.method.apply(pipe, case.config)
    case.run(pipe)
    patch.remove()
    patch.remove()
    assert torch.equal(case.run(pipe), plain(case.family.name))
    assert {part: sorted(vars(module)) for part, module in case.model(pipe).named_modules()} == attributes


def a_second_application_is_refused(case: Case) -> None:
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.config):
        with pytest.raises(ValueError, match="already on"):
            case.method.apply(pipe, case.config)
        assert torch.equal(case.run(pipe), case.once())
    assert torch.equal(case.run(pipe), plain(case.family.name))


def runs_leave_nothing_behind(case: Case) -> None:
    """One patched pipeline through many settings gives what a fresh one gives for each."""
    settings = [{}, {"seed": 1}, {"steps": STEPS + 2}, {"guidance": 1.0}, {"batch": 2}, {}]
    if case.family.sizes[1] is not None:
        settings.insert(2, {"size": case.family.sizes[1]})
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.config):
        for setting in settings:
            assert torch.equal(case.run(pipe, **setting), case.once(**setting)), setting


def an_interrupted_run_leaves_nothing_behind(case: Case) -> None:
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.config):
        calls = []

        def stop(*_):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        handle = case.model(pipe).register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            case.run(pipe, steps=9)
        handle.remove()
        assert torch.equal(case.run(pipe), case.once())


def image_to_image(case: Case) -> None:
    if case.family.image_to_image is None:
        with pytest.raises(ValueError, match="no image-to-image"):
            case.family.second_pipe(case.family.pipe())
        return
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    setting = dict(image=image, strength=0.7, steps=8)

    def pipe():
        return case.family.second_pipe(case.family.pipe())
    expected = case.run(pipe(), **setting)
    patched = pipe()
    with case.method.apply(patched, case.config) as patch:
        first = case.run(patched, **setting)
        assert patch.report()["state"] == "engaged"
        assert torch.equal(case.run(patched, **setting), first)
    assert first.isfinite().all() and not torch.equal(first, expected)
    assert torch.equal(case.run(patched, **setting), expected)


def two_models_in_two_threads_equal_solo_runs(case: Case) -> None:
    solo = {seed: case.once(seed=seed) for seed in (0, 1)}
    pipes = {seed: case.family.pipe() for seed in (0, 1)}
    found = {}
    with contextlib.ExitStack() as stack:
        for pipe in pipes.values():
            stack.enter_context(case.method.apply(pipe, case.config))
        threads = [threading.Thread(target=lambda s=seed: found.update({s: case.run(pipes[s], seed=s)})) for seed in pipes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed, expected in solo.items():
        assert torch.equal(found[seed], expected)


def a_second_thread_in_a_run_is_refused(case: Case) -> None:
    pipe = case.family.pipe()
    model = case.model(pipe)
    seen: list[BaseException | None] = []
    with case.method.apply(pipe, case.config):

        def intrude(module, args, kwargs):
            if seen:
                return

            def call():
                try:
                    module(*args, **kwargs)
                    seen.append(None)
                except RuntimeError as error:
                    seen.append(error)
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

        handle = model.register_forward_pre_hook(intrude, with_kwargs=True)
        result = case.run(pipe)
        handle.remove()
    assert "two threads" in str(seen[0])
    assert torch.equal(result, case.once())


def two_interleaved_pipelines_are_refused(case: Case) -> None:
    pipe = case.family.pipe()
    other = copy.copy(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with case.method.apply(pipe, case.config):
        original, ran = pipe.scheduler.step, []

        def step(*args, **kwargs):
            if not ran:
                ran.append(1)
                case.run(other, seed=7)
            return original(*args, **kwargs)

        pipe.scheduler.step = step
        with pytest.raises(RuntimeError, match="two pipelines|outside its"):
            case.run(pipe)
        pipe.scheduler.step = original


def saving_is_clean(case: Case) -> None:
    pipe = case.family.pipe()
    model = case.model(pipe)
    names = list(model.state_dict())
    with case.method.apply(pipe, case.config), tempfile.TemporaryDirectory() as folder:
        case.run(pipe)
        assert list(model.state_dict()) == names
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def a_copy_is_refused(case: Case) -> None:
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.config):
        with pytest.raises(RuntimeError, match="cannot be copied"):
            copy.deepcopy(case.model(pipe))
    twin = copy.deepcopy(case.model(pipe))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(case.run(pipe), plain(case.family.name))


def the_global_generator_is_untouched(case: Case) -> None:
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.config):
        before = torch.get_rng_state()
        case.run(pipe)
        assert torch.equal(torch.get_rng_state(), before)


def a_replaced_scheduler_is_noticed(case: Case) -> None:
    """Either the patch goes on working with the new scheduler, or it says that it must be applied again."""
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.config):
        case.run(pipe)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        try:
            out = case.run(pipe)
        except RuntimeError as error:
            assert "apply the patch again" in str(error)
        else:
            assert torch.equal(out, case.once())


def half_precision(case: Case) -> None:
    pipe = case.family.pipe()
    case.model(pipe).to(torch.bfloat16)
    with case.method.apply(pipe, case.config) as patch:
        out = case.run(pipe)
        assert patch.report()["state"] == "engaged"
    assert out.isfinite().all()


CHECKS = [off_is_the_identity, on_changes_the_result_and_costs_less, removal_restores_every_bit,
          a_second_application_is_refused, runs_leave_nothing_behind, an_interrupted_run_leaves_nothing_behind, image_to_image,
          two_models_in_two_threads_equal_solo_runs, a_second_thread_in_a_run_is_refused,
          two_interleaved_pipelines_are_refused, saving_is_clean, a_copy_is_refused,
          the_global_generator_is_untouched, a_replaced_scheduler_is_noticed, half_precision]
