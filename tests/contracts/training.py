"""What every method of kind `training` must show, on every family whose model it converts. Each check takes a `Case`.

A test file runs them all:

    @pytest.mark.parametrize("check, case", training.cases(dydit), ids=training.name)
    def test_contract(check, case):
        check(case)

The method offers `convert(model, config)`, `loss(model, noising, x0, *, step, random, **conditions)`, which returns a dict
with "loss", `save` and `load`, and names two configurations: OFF, and TINY, which engages on models of random weights.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from contracts.patch import refusals
from families import FAMILIES, Family
from torch import Tensor, nn

from accel_tools.measure.macs import count_macs
from methods._core.noise import Noising

LATE = 10**6                       # a step of training behind every warm-up


@dataclass(frozen=True)
class Case:
    """A method on one family."""

    method: ModuleType
    family: Family

    def __str__(self) -> str:
        return self.family.name

    def pipe(self, config: Any) -> tuple[Any, nn.Module]:
        """A pipeline with its transformer converted, and the transformer it had."""
        pipe = self.family.pipe()
        model = pipe.transformer
        pipe.transformer = self.method.convert(model, config)
        return pipe, model

    def run(self, pipe: Any) -> Tensor:
        return self.family.run(pipe, steps=3)

    def loss(self, model: nn.Module, *, step: int = LATE, seed: int = 0) -> dict[str, Tensor]:
        """On one fixed batch."""
        x0, conditions, noising = batch(self.family.name)
        random = torch.Generator().manual_seed(seed)
        return self.method.loss(model, noising, x0, step=step, random=random, **conditions)

    def train(self, model: nn.Module, steps: int, lr: float = 3e-3) -> list[float]:
        """The loss before each of `steps` steps on one fixed batch with fixed noise; gradients of the last are kept."""
        optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            found = self.loss(model)["loss"]
            found.backward()
            optimizer.step()
            losses.append(float(found.detach()))
        return losses


@cache
def plain(family: str) -> Tensor:
    return FAMILIES[family].run(FAMILIES[family].pipe(), steps=3)


@cache
def batch(family: str) -> tuple[Tensor, dict[str, Any], Noising]:
    """Clean latents and the conditions that the family's pipeline gives its model, for eight rows, and the noise."""
    pipe, seen = FAMILIES[family].pipe(), []
    model = Family.model(pipe)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    FAMILIES[family].run(pipe, steps=1, batch=4)
    args, kwargs = seen[0]
    x = args[0] if args else kwargs["hidden_states"]
    conditions = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "timestep", "return_dict")}
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), conditions, Noising(pipe.scheduler)


@cache
def served(method: ModuleType) -> dict[str, str | None]:
    """Of each of the first families the words in which it is refused, None where its model is converted."""
    return refusals(lambda family: method.convert(family.model(family.pipe()), method.TINY))


def cases(method: ModuleType) -> list[tuple]:
    """Every check on every family the method converts, and the refusal of the others."""
    return [(check, Case(method, FAMILIES[name])) for name, refusal in served(method).items()
            for check in ([others_are_refused_in_words] if refusal else CHECKS)]


def name(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the checks --------------------------------------------------------------------------------------------------------

def off_is_the_identity(case: Case) -> None:
    pipe, _ = case.pipe(case.method.OFF)
    assert torch.equal(case.run(pipe), plain(case.family.name))


def the_pipeline_runs_the_converted_model(case: Case) -> None:
    pipe, model = case.pipe(case.method.TINY)
    assert isinstance(pipe.transformer, type(model)) and pipe.components["transformer"] is pipe.transformer
    out = case.run(pipe)
    assert out.shape == plain(case.family.name).shape and out.isfinite().all()
    assert not torch.equal(out, plain(case.family.name))
    assert torch.equal(case.run(pipe), out)


def the_original_is_left_as_it_was(case: Case) -> None:
    pipe = case.family.pipe()
    model, before = pipe.transformer, bits(pipe.transformer)
    attributes = {part: sorted(vars(module)) for part, module in model.named_modules()}
    flags = [weight.requires_grad for weight in model.parameters()]
    converted = case.method.convert(model, case.method.TINY)
    case.train(converted, 3)
    assert same(bits(model), before) and flags == [weight.requires_grad for weight in model.parameters()]
    assert {part: sorted(vars(module)) for part, module in model.named_modules()} == attributes
    assert torch.equal(case.run(pipe), plain(case.family.name))


def what_is_frozen_stays_and_what_trains_moves(case: Case) -> None:
    model = case.method.convert(case.family.pipe().transformer, case.method.TINY)
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    before, reached = bits(model), set()
    for seed in range(6):
        case.loss(model, seed=seed)["loss"].backward()
        reached |= {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
    assert reached == trains != set()
    case.train(model, 3)
    moved = {name for name, value in bits(model).items() if not torch.equal(value, before[name])}
    assert moved == trains and len(trains) < len(before)


def the_loss_falls(case: Case) -> None:
    losses = case.train(case.method.convert(case.family.pipe().transformer, case.method.TINY), 15)
    assert torch.tensor(losses).isfinite().all() and losses[-1] < 0.9 * losses[0]


def draws_come_from_the_generator_alone(case: Case) -> None:
    before = torch.get_rng_state()
    pipe, _ = case.pipe(case.method.TINY)
    first = case.loss(pipe.transformer)["loss"]
    first.backward()
    torch.set_rng_state(before)
    case.run(pipe)
    assert torch.equal(torch.get_rng_state(), before)
    again = case.method.convert(case.family.pipe().transformer, case.method.TINY)
    before = torch.get_rng_state()
    assert torch.equal(case.loss(again)["loss"], first)
    assert not torch.equal(case.loss(again, seed=1)["loss"], first)
    assert torch.equal(torch.get_rng_state(), before)


def the_trained_part_goes_into_a_file_and_back(case: Case) -> None:
    pipe, _ = case.pipe(case.method.TINY)
    case.train(pipe.transformer, 3)
    again, _ = case.pipe(case.method.TINY)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part.safetensors"
        case.method.save(pipe.transformer, path)
        case.method.load(again.transformer, path)
        assert same(bits(again.transformer), bits(pipe.transformer))
        assert torch.equal(case.run(again), case.run(pipe))
        weight = next(weight for weight in again.transformer.parameters() if weight.requires_grad)
        weight.requires_grad_(False)                                     # another trained part
        before = bits(again.transformer)
        with pytest.raises(ValueError, match="part.safetensors also holds"):
            case.method.load(again.transformer, path)
        assert same(bits(again.transformer), before)


def it_costs_less(case: Case) -> None:
    pipe, _ = case.pipe(case.method.TINY)
    case.train(pipe.transformer, 10)
    family = case.family.pipe()
    assert count_macs(lambda: case.run(pipe)) < count_macs(lambda: case.run(family))


def a_copy_stands_by_itself(case: Case) -> None:
    pipe, _ = case.pipe(case.method.TINY)
    case.loss(pipe.transformer)["loss"].backward()
    other, out = copy.deepcopy(pipe.transformer), case.run(pipe)
    case.train(other, 3)
    assert torch.equal(case.run(pipe), out)
    pipe.transformer = other
    assert not torch.equal(case.run(pipe), out)


def an_error_in_the_loss_leaves_nothing_behind(case: Case) -> None:
    pipe, _ = case.pipe(case.method.TINY)
    out = case.run(pipe)

    def stop(*_):
        raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        case.loss(pipe.transformer)
    handle.remove()
    assert torch.equal(case.run(pipe), out)


def half_precision(case: Case) -> None:
    pipe = case.family.pipe()
    pipe.transformer = case.method.convert(pipe.transformer.to(torch.bfloat16), case.method.TINY)
    assert {weight.dtype for weight in pipe.transformer.parameters()} == {torch.bfloat16}
    assert case.run(pipe).isfinite().all()


def what_is_not_converted_is_refused(case: Case) -> None:
    model = case.family.pipe().transformer
    with pytest.raises(ValueError, match="convert it first"):
        case.loss(model)
    with pytest.raises(ValueError, match="already"):
        case.method.convert(case.method.convert(model, case.method.TINY), case.method.TINY)


def others_are_refused_in_words(case: Case) -> None:
    pipe = case.family.pipe()
    model = getattr(pipe, "unet", None) or pipe.transformer
    before = bits(model)
    with pytest.raises((TypeError, ValueError), match=type(model).__name__):
        case.method.convert(model, case.method.TINY)
    assert same(bits(model), before)


CHECKS = [off_is_the_identity, the_pipeline_runs_the_converted_model, the_original_is_left_as_it_was,
          what_is_frozen_stays_and_what_trains_moves, the_loss_falls, draws_come_from_the_generator_alone,
          the_trained_part_goes_into_a_file_and_back, it_costs_less, a_copy_stands_by_itself,
          an_error_in_the_loss_leaves_nothing_behind, half_precision, what_is_not_converted_is_refused]
