"""What every method of kind `module` must show: a network of its own, built from a Config. Each check takes a `Case`.

A test file runs them all:

    @pytest.mark.parametrize("check, case", module.cases(titok, WORK), ids=module.name)
    def test_contract(check, case):
        check(case)

The method offers `build(config)`, TINY, a Config small enough for a test, and `save` and `load`. If it trains in stages it
names them in STAGES, stage -> the parts that it trains, and offers `enter(model, stage)`. `Work` is what a test file says of
it: how to run the network, and how to take a loss of each stage on one fixed batch.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Work:
    """`run(model, random)` -> its outputs by name, whose shapes are `shapes`; `loss(model, stage, random)` -> a scalar of the
    same batch at every call; `wrong`: values of Config that are refused, each by its name."""

    run: Callable[[nn.Module, torch.Generator], Mapping[str, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    loss: Callable[[nn.Module, str, torch.Generator], Tensor]
    wrong: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """A method, and a stage of its training."""

    method: ModuleType
    work: Work
    stage: str

    def __str__(self) -> str:
        return self.stage

    def build(self, **more: Any) -> nn.Module:
        return self.method.build(replace(self.method.TINY, **more))

    def run(self, model: nn.Module, seed: int = 0) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return self.work.run(model, torch.Generator().manual_seed(seed))

    def loss(self, model: nn.Module, seed: int = 0) -> Tensor:
        return self.work.loss(model, self.stage, torch.Generator().manual_seed(seed))

    def train(self, model: nn.Module, steps: int, lr: float = 3e-3) -> list[float]:
        """The loss before each of `steps` steps on one batch with the same draws."""
        optimizer, losses = torch.optim.Adam(self.method.enter(model, self.stage), lr=lr), []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(model)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def trains(self, name: str) -> bool:
        """Whether this stage trains the parameter of that name."""
        return name.split(".")[0] in self.method.STAGES[self.stage]


def cases(method: ModuleType, work: Work) -> list[tuple]:
    """Checks of the network once, those of training at every stage."""
    stages = list(method.STAGES)
    return ([(check, Case(method, work, stages[0])) for check in NETWORK]
            + [(check, Case(method, work, stage)) for check in TRAINING for stage in stages])


def name(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the network -------------------------------------------------------------------------------------------------------

def outputs_have_their_shapes(case: Case) -> None:
    found = case.run(case.build())
    assert {name: tuple(value.shape) for name, value in found.items()} == dict(case.work.shapes)
    assert all(value.isfinite().all() for value in found.values())


def the_config_says_everything(case: Case) -> None:
    """One Config builds one network, bit by bit; another seed another one of the same shapes. All of it can be trained."""
    first, again, other = case.build(), case.build(), case.build(seed=case.method.TINY.seed + 1)
    assert same(bits(first), bits(again)) and not same(bits(first), bits(other))
    assert {name: value.shape for name, value in bits(first).items()} == {n: value.shape for n, value in bits(other).items()}
    assert all(parameter.requires_grad for parameter in first.parameters())


def draws_come_from_the_generator_alone(case: Case) -> None:
    before = torch.get_rng_state()
    model = case.build()
    first = case.run(model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(case.run(case.build()), first) and same(case.run(model), first)
    assert not same(case.run(model, seed=1), first)


def it_goes_into_a_file_and_back(case: Case) -> None:
    model, again = case.build(), case.build(seed=case.method.TINY.seed + 1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        case.method.save(model, path)
        case.method.load(again, path)
    assert same(bits(again), bits(model)) and same(case.run(again), case.run(model))


def half_precision(case: Case) -> None:
    found = case.run(case.build().to(torch.bfloat16))
    assert all(value.isfinite().all() for value in found.values())
    assert torch.bfloat16 in {value.dtype for value in found.values()}


def a_copy_stands_by_itself(case: Case) -> None:
    model = case.build()
    before, other = bits(model), copy.deepcopy(model)
    case.train(other, 2)
    assert same(bits(model), before) and not same(bits(other), before)


def a_bad_config_is_refused_by_name(case: Case) -> None:
    for wrong in case.work.wrong:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(case.method.TINY, **wrong)
    with pytest.raises(ValueError, match="stage='no such stage'.*" + case.stage):
        case.method.enter(case.build(), "no such stage")


# ---- its training ------------------------------------------------------------------------------------------------------

def what_is_frozen_stays_and_what_trains_moves(case: Case) -> None:
    """Over several draws every parameter of the stage has a gradient, and no other one has any; behind a layer that starts at
    zero it takes a few steps until the first gradient comes."""
    model = case.build()
    before = bits(model)
    case.train(model, 6)
    moved = {name for name, value in bits(model).items() if not torch.equal(value, before[name])}
    model.zero_grad(set_to_none=True)
    parameters = case.method.enter(model, case.stage)
    names = {name for name, _ in model.named_parameters() if case.trains(name)}
    assert {id(parameter) for parameter in parameters} == {id(p) for name, p in model.named_parameters() if name in names}
    reached = set()
    for seed in range(6):
        loss = case.loss(model, seed)
        assert loss.shape == () and loss.isfinite()
        loss.backward()
        reached |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(p.grad.isfinite().all() for p in parameters if p.grad is not None)
    assert reached == names != set()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in names) and moved == names


def the_loss_falls(case: Case) -> None:
    losses = case.train(case.build(), 25)
    assert torch.tensor(losses).isfinite().all() and losses[-1] < 0.9 * losses[0]


def draws_of_the_loss_come_from_the_generator_alone(case: Case) -> None:
    model, before = case.build(), torch.get_rng_state()
    case.method.enter(model, case.stage)
    first = case.loss(model)
    first.backward()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(case.loss(case.build()), first)


def the_loss_is_finite_in_half_precision(case: Case) -> None:
    model = case.build()
    parameters = case.method.enter(model, case.stage)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss(model)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in parameters if p.grad is not None)


NETWORK = [outputs_have_their_shapes, the_config_says_everything, draws_come_from_the_generator_alone,
           it_goes_into_a_file_and_back, half_precision, a_copy_stands_by_itself, a_bad_config_is_refused_by_name]
TRAINING = [what_is_frozen_stays_and_what_trains_moves, the_loss_falls, draws_of_the_loss_come_from_the_generator_alone,
            the_loss_is_finite_in_half_precision]
