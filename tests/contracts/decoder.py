"""What every method of kind `decoder` must show, on every model of token ids it serves. Each check takes a `Case`.

A test file runs them all:

    @pytest.mark.parametrize("check, case", decoder.cases(sjd, MODELS, PROMPT), ids=decoder.name)
    def test_contract(check, case):
        check(case)

The method offers `generate(model, prompt, config)`, whose result has `tokens` (B, N) and a `report` with `forwards`; OFF, with
which it is sequential sampling, and TINY, a Config of a few tokens. Both may be combined with another seed or with greedy
choice by `dataclasses.replace`.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A method on one model; `make(dtype=...)` builds the model anew."""

    method: ModuleType
    model: str
    make: Callable[..., nn.Module]
    prompt: Tensor

    def __str__(self) -> str:
        return self.model

    def run(self, model: nn.Module, config: Any = None, **more: Any) -> Any:
        return self.method.generate(model, self.prompt, replace(config or self.method.TINY, **more))


def cases(method: ModuleType, models: Mapping[str, Callable[..., nn.Module]], prompt: Tensor) -> list[tuple]:
    return [(check, Case(method, name, make, prompt)) for check in CHECKS for name, make in models.items()]


def name(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)


# ---- the checks -------------------------------------------------------------------------------------------------------


def greedy_tokens_are_those_of_sequential_sampling(case: Case) -> None:
    model = case.make(dtype=torch.float64)
    off = replace(case.method.TINY, window=case.method.OFF.window, temperature=0)
    assert torch.equal(case.run(model, temperature=0).tokens, case.run(model, off).tokens)


def it_takes_fewer_passes(case: Case) -> None:
    model = case.make(dtype=torch.float64)
    tokens, passes = case.method.TINY.tokens, []
    handle = next(model.children()).register_forward_hook(lambda *_: passes.append(1))
    report = case.run(model, temperature=0).report
    handle.remove()
    assert report["forwards"] == len(passes) < tokens
    assert case.run(model, window=case.method.OFF.window).report["forwards"] == tokens


def draws_come_from_the_seed_alone(case: Case) -> None:
    model, before = case.make(), torch.get_rng_state()
    first = case.run(model, seed=5).tokens
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(case.run(model, seed=5).tokens, first)
    assert not torch.equal(case.run(model, seed=6).tokens, first)
    torch.set_rng_state(before)


def the_model_is_left_as_it_was(case: Case) -> None:
    model = case.make()
    before = {part: sorted(vars(module)) for part, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    case.run(model)
    assert {part: sorted(vars(module)) for part, module in model.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def an_interrupted_run_leaves_nothing_behind(case: Case) -> None:
    model, calls = case.make(), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    expected = case.run(case.make()).tokens
    handle = next(model.children()).register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        case.run(model)
    handle.remove()
    assert torch.equal(case.run(model).tokens, expected)


def half_precision(case: Case) -> None:
    tokens = case.run(case.make(dtype=torch.bfloat16)).tokens
    assert tokens.shape == (len(case.prompt), case.method.TINY.tokens)


def training_mode_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="training mode"):
        case.run(case.make().train())


CHECKS = [greedy_tokens_are_those_of_sequential_sampling, it_takes_fewer_passes, draws_come_from_the_seed_alone,
          the_model_is_left_as_it_was, an_interrupted_run_leaves_nothing_behind, half_precision, training_mode_is_refused]
