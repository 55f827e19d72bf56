"""Which methods act on a pipeline at hand, found by putting each on it."""
from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

from methods._core.context import experts, split_target

STATES = {"engaged": "it left work out of the run", "applies": "it can be applied; give a run to see what it does",
          "no gain": "it left nothing out of the run", "refuses": "it says why it cannot", "fails": "the run broke under it"}


@dataclass(frozen=True)
class Found:
    """What one method does: `state` is one of STATES, `setting` the fields of its Config that make it run, `saved` the share
    of what it acts on, module calls, tokens or evaluations, that it left out, `why` its own words where it does nothing."""

    method: str
    state: str
    setting: dict[str, Any] = field(default_factory=dict)
    saved: float | None = None
    cached_bytes: int | None = None
    why: str = ""

    @property
    def apply(self) -> str:
        """The call that puts it on `pipe`."""
        setting = ", ".join(f"{name}={value!r}" for name, value in self.setting.items())
        return f"{self.method}.apply(pipe, {self.method}.Config({setting}))" if setting else f"{self.method}.apply(pipe)"


@dataclass(frozen=True)
class Check:
    """All methods on one pipeline, those that save most first; printed as a table."""

    model: str
    found: tuple[Found, ...]

    def __str__(self) -> str:
        width = max(len(each.method) for each in self.found)
        serve = sum(each.state in ("engaged", "applies") for each in self.found)
        lines = [f"{self.model}: {serve} of {len(self.found)} methods"]
        for each in self.found:
            said = each.why if each.why else each.apply
            did = [] if each.saved is None else [f"{each.saved:.0%} left out"]
            did += [f"keeps {each.cached_bytes / 2 ** 20:.1f} MiB"] if each.cached_bytes else []
            lines.append(f"{each.method:{width}}  {each.state:8} {', '.join(did):32}  {said}".rstrip())
        return "\n".join(lines)


def patches() -> Iterator[ModuleType]:
    """The modules of all methods that are put on a pipeline by themselves."""
    import methods
    for module in pkgutil.iter_modules(methods.__path__):
        if not module.name.startswith("_"):
            method = importlib.import_module(f"methods.{module.name}")
            if hasattr(method, "apply") and list(inspect.signature(method.apply).parameters)[1:] == ["config"]:
                yield method


def check(pipe: Any, run: Callable[[], Any] | None = None) -> Check:
    """Try every method on a pipeline and take it off again; the pipeline stays as it is.

    Args:
        pipe: a diffusers pipeline, or its denoiser. Patches that are on it stay, and what cannot stack with them refuses.
        run: samples with it, such as `lambda: pipe("a cat", num_inference_steps=6)`: once under each method. None: methods are
            only put on and taken off, which tells who refuses but not who saves.

    Raises:
        TypeError: no pipeline with a denoiser.
    """
    _, model = split_target(experts(pipe)[0])
    found = [_try(method, pipe, run) for method in patches()]
    order = list(STATES)
    found.sort(key=lambda each: (order.index(each.state), -(each.saved or 0), each.method))
    return Check(type(model).__name__, tuple(found))


def settings(method: ModuleType) -> tuple[dict[str, Any], ...]:
    """What is tried on a model in turn: the default, what the method names in `ELSEWHERE`, and tokens a level further down."""
    deeper = [{"max_downsample": 2}] if "max_downsample" in {each.name for each in fields(method.Config)} else []
    return {}, *getattr(method, "ELSEWHERE", ()), *deeper


def _try(method: ModuleType, pipe: Any, run: Callable[[], Any] | None) -> Found:
    """The first of its settings that engages, else what it said to the first."""
    name, first = method.__name__.rpartition(".")[2], None
    for setting in settings(method):
        try:
            with method.apply(pipe, method.Config(**setting)) as patch:
                if run is None:
                    return Found(name, "applies", setting)
                run()
                report = patch.report()
        except (TypeError, ValueError) as refusal:
            found = Found(name, "refuses", why=str(refusal))
        except RuntimeError as error:
            found = Found(name, "fails", why=str(error).splitlines()[0])
        else:
            found = Found(name, "engaged" if report["state"] == "engaged" else "no gain", setting, report.get("saved"),
                          report["cached_bytes"], report.get("reason", ""))
        if found.state == "engaged":
            return found
        first = first or found
    return first
