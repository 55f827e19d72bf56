"""What every method of kind `patch` must show, on every family it works on. Each check takes a `Case`.

A test file runs them all:

    @pytest.mark.parametrize("check, case", contract.cases(tome, tome.Config(ratio=0.5)), ids=contract.name)
    def test_contract(check, case):
        check(case)

They run on the families of `ARCHETYPES`; on every other family, tests/test_compatibility.py tries that the method engages,
changes the result and comes off. `pytest --everything` runs all checks on all families. A module whose defaults do nothing on
small models of random weights names a Config that does in `TINY`.
"""
from __future__ import annotations

import contextlib
import copy
import fcntl
import gc
import importlib
import itertools
import json
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from families import FAMILIES, FIRST, Family

from accel_tools.measure.macs import count_macs
from methods._core import patch as patch_module
from methods._core.check import settings
from methods._core.context import Run
from methods._core.denoiser import describe
from methods._core.patch import Patch
from methods._core.site import Claim

ROOT = Path(__file__).parents[2]
COMPATIBILITY = ROOT / "catalog/compatibility.json"
QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
STEPS = 5
WIRING = ("around", "attend", "claim", "rewrite", "each_call", "after_call", "each_run", "solve", "slot", "explain", "on")
ARCHETYPES = ("unet", "flux", "latte")         # a UNet, two streams with positions inside the attention, frames and time


def slug(method: ModuleType) -> str:
    return method.__name__.removeprefix("methods.")


def engaging(method: ModuleType) -> Any:
    """A configuration that does something on the families' small models: the module's own `TINY`, or its default."""
    return getattr(method, "TINY", None) or method.Config()


def several(*methods: ModuleType) -> dict[str, Any]:
    """How a run must be for all of these to act: some want more than one prompt, from the same noise."""
    prompts = max(getattr(method, "PROMPTS", 1) for method in methods)
    return {} if prompts == 1 else {"batch": prompts, "twins": True}


@dataclass(frozen=True)
class Case:
    """A method with an engaging configuration, on one family."""

    method: ModuleType
    config: Any
    family: Family

    def __str__(self) -> str:
        return self.family.name

    def run(self, pipe: Any, **setting) -> torch.Tensor:
        return self.family.run(pipe, **{"steps": STEPS} | several(self.method) | setting)

    def plain(self) -> torch.Tensor:
        """The run of an untouched pipeline."""
        return plain(self.family.name, **several(self.method))

    def model(self, pipe: Any) -> torch.nn.Module:
        return self.family.model(pipe)

    def once(self, **setting) -> torch.Tensor:
        """One patched run on an untouched pipeline."""
        pipe = self.family.pipe()
        with self.method.apply(pipe, self.config):
            return self.run(pipe, **setting)


@cache
def plain(family: str, **setting) -> torch.Tensor:
    return FAMILIES[family].run(FAMILIES[family].pipe(), **{"steps": STEPS} | setting)


@cache
def patches() -> list[ModuleType]:
    """All methods of kind `patch` that are there."""
    modules = [importlib.import_module(f"methods.{path.stem}") for path in sorted((ROOT / "methods").glob("[a-z]*.py"))]
    return [module for module in modules if entry(module)["kind"] == "patch"]


@cache
def attempt(method: ModuleType, family: Family) -> dict[str, Any]:
    """Whether a method works on a family, found by trying: what stands in the committed table.

    Works is: it engages and changes the result, which stays finite, and it comes off without a trace. Where its default is
    refused, the settings of its `ELSEWHERE` are tried, and reducers of tokens a level further down; `with` says which works.
    """
    config, pipe = engaging(method), untouched(family.name)
    found: dict[str, Any] = {}
    for change in settings(method):
        try:
            patch = method.apply(pipe, replace(config, **change))
        except ValueError as refusal:
            found = found or {"works": False, "reason": str(refusal)}
            continue
        with patch:
            out, report = family.run(pipe, **several(method) | {"steps": 6}), patch.report()
        if report["state"] == "no gain":
            found = found or {"works": False, "reason": report["reason"]}
            continue
        assert report["state"] == "engaged", (method, family.name, report)
        setting = several(method) | {"steps": 6}
        assert out.isfinite().all() and not torch.equal(out, plain(family.name, **setting))
        assert torch.equal(family.run(pipe, **setting), plain(family.name, **setting))
        return {"works": True} | ({"with": change} if change else {})
    return found


def record(path: Path, method: ModuleType, row: dict[str, Any]) -> None:
    """Write the row of one method into a table; methods are tried side by side."""
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        table = json.load(file) | {slug(method): row}
        there = sorted(table.keys() & set(map(slug, patches())))
        file.seek(0)
        file.truncate()
        json.dump({each: table[each] for each in there}, file, indent=1, ensure_ascii=False)
        file.write("\n")


@cache
def untouched(family: str) -> Any:
    """One pipeline of a family, on which patches are put and taken off again."""
    return FAMILIES[family].pipe()


def working(method: ModuleType) -> list[Family]:
    """The first families on which the method works as it is."""
    return [FAMILIES[name] for name in FIRST if setting(method, FAMILIES[name]) == {}]


@cache
def table() -> dict[str, dict[str, Any]]:
    """The committed table as it was when tests were collected."""
    return json.loads(COMPATIBILITY.read_text())


def setting(method: ModuleType, family: Family) -> dict[str, Any] | None:
    """What of the configuration differs where the method works on the family, by the committed table, which
    tests/test_compatibility.py holds true, or by trying where that has no row yet; None where it does not work."""
    found = table().get(slug(method), {}).get(family.name) or attempt(method, family)
    return found.get("with", {}) if found["works"] else None


@cache
def entry(method: ModuleType) -> dict[str, Any]:
    """What the catalogue says of a method."""
    return yaml.load((ROOT / f"catalog/entries/{slug(method)}.yaml").read_text(), QUICK)


def claims(method: ModuleType) -> list[str]:
    """What the method's entry says that it saves."""
    return entry(method).get("claims", ["macs"])


def cases(method: ModuleType, config: Any) -> list[tuple]:
    """The checks on the families the method works on, with the setting that makes it work there."""
    found = [Case(method, replace(config, **change), family) for family in FAMILIES.values()
             if (change := setting(method, family)) is not None]
    some = [case for case in found if case.family.name in ARCHETYPES] or found[:1]
    found = found if "EVERYTHING" in os.environ else some
    checks = [check for check in CHECKS if check not in OF_COST or "macs" in claims(method)]
    return [(check, case) for check in checks for case in found]


def refusals(put: Callable[[Family], Any]) -> dict[str, str | None]:
    """Of each of the first families the words in which `put` refuses it, None where it does not.

    Raises:
        LookupError: it refuses all of them.
    """
    found: dict[str, str | None] = {}
    for family in (FAMILIES[name] for name in FIRST):
        try:
            put(family)
            found[family.name] = None
        except (TypeError, ValueError) as refusal:
            found[family.name] = str(refusal)
    if all(found.values()):
        raise LookupError(f"no family is served: {found}")
    return found


def costs_fall_and_distances_grow(method: ModuleType, configs: Iterable[Any], steps: int = 12) -> list[int]:
    """Along settings of a cache on the DiT, of which the first leaves nothing out. -> the steps that each computes"""
    computed, distances = [], []
    for config in configs:
        pipe = FAMILIES["dit"].pipe()
        with method.apply(pipe, config) as patch:
            distances.append(float((FAMILIES["dit"].run(pipe, steps=steps) - plain("dit", steps=steps)).square().mean()))
            computed.append(patch.report()["computed"])
    assert computed == sorted(computed, reverse=True) and computed[0] == steps
    assert distances == sorted(distances) and distances[0] == 0 < distances[-1]
    return computed


def around_the_blocks(case: Case, steps: int, first: int = 0) -> tuple[list[tuple[list, list]], dict]:
    """What enters block `first` and the tail behind the blocks, in each step, of every call of a step; and the report."""
    entered, left = [], []
    pipe = case.family.pipe()
    denoiser = describe(Family.model(pipe))
    block = denoiser.blocks[first]
    with case.method.apply(pipe, case.config) as patch:
        block.module.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(block.streams(args, kwargs)[0]), with_kwargs=True)
        denoiser.tail.register_forward_pre_hook(lambda module, args: left.append(args[0]))
        case.family.run(pipe, steps=steps)
        report = patch.report()
    calls = len(left) // steps
    return [(entered[call::calls], left[call::calls]) for call in range(calls)], report


def compiled_blocks_agree(case: Case, steps: int) -> list[dict]:
    """Runs with blocks as they are, and compiled whole, agree. -> what the patch reports of both"""
    outs, reports = [], []
    for compiled in (False, True):
        pipe = case.family.pipe()
        torch._dynamo.reset()
        with case.method.apply(pipe, case.config) as patch, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for block in describe(Family.model(pipe)).blocks if compiled else ():
                block.module.compile(fullgraph=True, backend="aot_eager")
            outs.append(case.family.run(pipe, steps=steps))
            reports.append(patch.report())
    torch._dynamo.reset()
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-2)
    return reports


def name(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)


# ---- the checks --------------------------------------------------------------------------------------------------------

def off_is_the_identity(case: Case) -> None:
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.method.OFF) as patch:
        assert torch.equal(case.run(pipe), case.plain())
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
    before = attributes(case, pipe)
    patch = case.method.apply(pipe, case.config)
    case.run(pipe)
    patch.remove()
    patch.remove()
    assert torch.equal(case.run(pipe), case.plain())
    assert attributes(case, pipe) == before


def a_second_application_is_refused(case: Case) -> None:
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.config):
        with pytest.raises(ValueError, match="already on"):
            case.method.apply(pipe, case.config)
        assert torch.equal(case.run(pipe), case.once())
    assert torch.equal(case.run(pipe), case.plain())


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
    """Neither a callback that raises, nor Ctrl-C in the middle of the model, nor a thread that ends there."""
    pipe = case.family.pipe()
    inside = next(part for part in case.model(pipe).modules() if isinstance(part, torch.nn.Linear))
    with case.method.apply(pipe, case.config):
        for error in (KeyboardInterrupt, SystemExit, RuntimeError):
            calls = []

            def stop(*_, error=error, calls=calls):
                calls.append(1)
                if len(calls) == 3:
                    raise error

            handle = inside.register_forward_hook(stop)
            if error is SystemExit:
                thread = threading.Thread(target=case.run, args=(pipe,), kwargs={"steps": 9})
                thread.start()
                thread.join()
            else:
                with pytest.raises(error):
                    case.run(pipe, steps=9)
            assert len(calls) == 3
            handle.remove()
            assert torch.equal(case.run(pipe), case.once())


def attributes(case: Case, pipe: Any) -> tuple:
    """What is set on the modules of the denoiser and on the scheduler."""
    modules = {part: sorted(vars(module)) for part, module in case.model(pipe).named_modules()}
    return modules, type(pipe.scheduler), sorted(vars(pipe.scheduler))


@contextlib.contextmanager
def failing(at: int) -> Iterator[None]:
    """The call number `at` of those by which a method puts itself on a model runs out of memory."""
    left = itertools.count(at, -1)

    def broken(real: Callable) -> Callable:
        def call(*args, **kwargs):
            if next(left) == 0:
                raise MemoryError
            return real(*args, **kwargs)
        return call

    with pytest.MonkeyPatch.context() as patched:
        for owner, name in [(Patch, name) for name in WIRING] + [(patch_module, "attach"), (Run, "add")]:
            patched.setattr(owner, name, broken(getattr(owner, name)))
        yield


def a_failed_application_leaves_nothing_behind(case: Case) -> None:
    pipe = case.family.pipe()
    before = attributes(case, pipe)
    for at in itertools.count():
        try:
            with failing(at):
                case.method.apply(pipe, case.config).remove()
        except MemoryError:
            assert attributes(case, pipe) == before, at
        else:
            break
    assert at > 1 and torch.equal(case.run(pipe), case.plain())


def engaged_means_cheaper(case: Case) -> None:
    """In a run of one step, as in any, the report says "engaged" if less was computed, else "no gain" and why."""
    for steps in (1, 2, STEPS):
        pipe = case.family.pipe()
        before = count_macs(lambda pipe=pipe, steps=steps: case.run(pipe, steps=steps))
        with case.method.apply(pipe, case.config) as patch:
            assert patch.report()["state"] == "idle"
            after = count_macs(lambda pipe=pipe, steps=steps: case.run(pipe, steps=steps))
            report = patch.report()
        if report["state"] == "no gain":
            assert after >= before and report["reason"] and report["saved"] <= 0
        else:
            assert report["state"] == "engaged" and after < before and 0 < report["saved"] < 1


def what_is_said_to_be_skipped_is_not_run(case: Case) -> None:
    """`reaches`, by which others plan and count, is true of every attention in every call."""
    pipe, said, ran = case.family.pipe(), [], []
    watch = Patch(pipe, "watch")
    blocks = [block for block in watch.denoiser.blocks if block.attn is not None]

    def before(context: Any) -> None:
        said.append([watch.reaches(block.attn) for block in blocks])
        ran.append([False] * len(blocks))

    watch.each_call(before)
    for i, block in enumerate(blocks):
        watch.around(block.attn, lambda forward, *a, i=i, **k: (ran[-1].__setitem__(i, True), forward(*a, **k))[1], Claim.LOOK)
    with case.method.apply(pipe, case.config), watch.on():
        case.run(pipe, steps=STEPS + 3)
    assert said == ran and said


def what_is_kept_can_be_limited(case: Case) -> None:
    pipe = case.family.pipe()
    with case.method.apply(pipe, case.config) as patch:
        whole = case.run(pipe)
        kept = patch.report()["cached_bytes"]
        with pytest.raises(ValueError, match="bytes=-1"):
            patch.limit(bytes=-1)
        with pytest.raises(ValueError, match="must be a floating-point type"):
            patch.limit(dtype=torch.int8)
        assert torch.equal(case.run(pipe), whole)
        half = patch.limit(dtype=torch.bfloat16) and case.run(pipe)
        assert half.isfinite().all() and half.dtype == whole.dtype and patch.report()["cached_bytes"] <= kept
        for share in (0.0, 0.4):
            out = patch.limit(bytes=int(kept * share)) and case.run(pipe)
            assert out.isfinite().all() and patch.report()["cached_bytes"] <= kept * share
        patch.limit()
        assert torch.equal(case.run(pipe), whole) and patch.report()["cached_bytes"] == kept


def a_server_does_not_fill_the_memory(case: Case) -> None:
    """A scheduler for each request is not held beyond it."""
    pipe, schedulers = case.family.pipe(), []
    with case.method.apply(pipe, case.config) as patch:
        for _ in range(4):
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            schedulers.append(weakref.ref(pipe.scheduler))
            try:
                case.run(pipe, steps=2)
            except RuntimeError as error:
                assert patch.solver is not None and "apply the patch again" in str(error)
        gc.collect()
        assert len(patch.run.watches) == 1 and sum(ref() is not None for ref in schedulers) <= 2


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

        def intrude(*_):
            if seen:
                return

            def call():
                try:
                    model(torch.zeros(1))
                    seen.append(None)
                except RuntimeError as error:
                    seen.append(error)
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

        inside = next(part for part in model.modules() if isinstance(part, torch.nn.Linear))
        handle = inside.register_forward_pre_hook(intrude)
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
        with pytest.raises(RuntimeError, match="two pipelines|outside its|apply the patch again"):
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
    assert torch.equal(case.run(pipe), case.plain())


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


OF_COST = (on_changes_the_result_and_costs_less, engaged_means_cheaper, what_is_said_to_be_skipped_is_not_run)
CHECKS = [off_is_the_identity, on_changes_the_result_and_costs_less, removal_restores_every_bit,
          a_second_application_is_refused, runs_leave_nothing_behind, an_interrupted_run_leaves_nothing_behind,
          a_failed_application_leaves_nothing_behind, engaged_means_cheaper, what_is_said_to_be_skipped_is_not_run,
          what_is_kept_can_be_limited, a_server_does_not_fill_the_memory, image_to_image,
          two_models_in_two_threads_equal_solo_runs, a_second_thread_in_a_run_is_refused,
          two_interleaved_pipelines_are_refused, saving_is_clean, a_copy_is_refused, the_global_generator_is_untouched,
          a_replaced_scheduler_is_noticed, half_precision]
