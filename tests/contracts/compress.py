"""What every method of kind `compress` must show, on each of the first families that it serves. Each check takes a `Case`.

A test file runs them all:

    @pytest.mark.parametrize("check, case", compress.cases(diff_pruning), ids=compress.name)
    def test_contract(check, case):
        check(case)

The method offers `compress(model, config, noising, batches)`, which gives a smaller model that stands in the place of the
other; `batches` yields clean samples with the conditions of the model, (x0, conditions). It offers `save(model, path)`, and
`load(model, path)`, which gives of the model that was compressed what `save` was given. It names two configurations: OFF,
and TINY, which engages on models of random weights.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from contracts.patch import claims, refusals
from contracts.training import batch, bits, same
from families import FAMILIES, Family
from torch import Tensor, nn

from accel_tools.measure.macs import count_macs


@dataclass(frozen=True)
class Case:
    """A method on one family."""

    method: ModuleType
    family: Family

    def __str__(self) -> str:
        return self.family.name

    def compressed(self, model: nn.Module, config: Any = None) -> nn.Module:
        return self.method.compress(model, config or self.method.TINY, batch(self.family.name)[2], batches(self.family.name))

    def pipe(self, config: Any = None) -> tuple[Any, nn.Module]:
        """A pipeline with its model compressed, and the model it had."""
        pipe = self.family.pipe()
        model = Family.model(pipe)
        self.put(pipe, self.compressed(model, config))
        return pipe, model

    def put(self, pipe: Any, model: nn.Module) -> None:
        setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", model)

    def run(self, pipe: Any, **setting) -> Tensor:
        return self.family.run(pipe, **{"steps": 3} | setting)


def batches(family: str) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Twice the same batch, to be read once."""
    x0, conditions, _ = batch(family)
    yield from [(x0, conditions)] * 2


@cache
def plain(family: str) -> Tensor:
    return FAMILIES[family].run(FAMILIES[family].pipe(), steps=3)


@cache
def served(method: ModuleType) -> dict[str, str | None]:
    """Of each of the first families the words in which it is refused, None where its model is compressed."""
    return refusals(lambda family: Case(method, family).pipe())


def cases(method: ModuleType) -> list[tuple]:
    """Every check on every family whose model the method compresses, and the refusal of the others."""
    checks = [check for check in CHECKS if check is not it_costs_less or "macs" in claims(method)]
    return [(check, Case(method, FAMILIES[name])) for name, refusal in served(method).items()
            for check in ([others_are_refused_in_words] if refusal else checks)]


def name(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)


def size(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


# ---- the checks --------------------------------------------------------------------------------------------------------

def off_is_the_identity(case: Case) -> None:
    pipe, model = case.pipe(case.method.OFF)
    assert same(bits(Family.model(pipe)), bits(model)) and torch.equal(case.run(pipe), plain(case.family.name))


def it_is_smaller(case: Case) -> None:
    pipe, model = case.pipe()
    assert size(Family.model(pipe)) < size(model)
    with TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "whole")
        case.method.save(Family.model(pipe), Path(folder) / "part.safetensors")
        assert (Path(folder) / "part.safetensors").stat().st_size < (Path(folder) / "whole").stat().st_size


def it_costs_less(case: Case) -> None:
    pipe, _ = case.pipe()
    whole = case.family.pipe()
    assert count_macs(lambda: case.run(pipe)) < count_macs(lambda: case.run(whole))


def it_takes_the_place_of_the_model(case: Case) -> None:
    """Of equal class and outputs of equal shape, whatever the batch and the size of the image."""
    pipe, model = case.pipe()
    other = case.family.pipe()
    assert isinstance(Family.model(pipe), type(model))
    for setting in ({}, {"batch": 2}, *([{"size": case.family.sizes[1]}] if case.family.sizes[1] else [])):
        out = case.run(pipe, **setting)
        assert out.shape == case.run(other, **setting).shape and out.isfinite().all()
        assert torch.equal(case.run(pipe, **setting), out)
    assert not torch.equal(case.run(pipe), plain(case.family.name))


def the_original_is_left_as_it_was(case: Case) -> None:
    pipe = case.family.pipe()
    model = Family.model(pipe)
    before, flags = bits(model), [weight.requires_grad for weight in model.parameters()]
    attributes = {part: sorted(vars(module)) for part, module in model.named_modules()}
    compressed = case.compressed(model)
    for weight in compressed.parameters():
        weight.data.zero_()
    assert same(bits(model), before) and flags == [weight.requires_grad for weight in model.parameters()]
    assert all(weight.grad is None for weight in model.parameters())
    assert {part: sorted(vars(module)) for part, module in model.named_modules()} == attributes
    assert torch.equal(case.run(pipe), plain(case.family.name))


def equal_inputs_give_equal_models(case: Case) -> None:
    """Random draws come from the Config alone."""
    before = torch.get_rng_state()
    first = case.compressed(Family.model(case.family.pipe()))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(bits(case.compressed(Family.model(case.family.pipe()))), bits(first))
    again = Family.model(case.family.pipe())
    torch.set_rng_state(state)
    case.compressed(again)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def it_goes_into_a_file_and_back(case: Case) -> None:
    pipe, model = case.pipe()
    kept, other = bits(model), case.family.pipe()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "part.safetensors"
        case.method.save(Family.model(pipe), path)
        case.put(other, case.method.load(model, path))
        assert same(bits(Family.model(other)), bits(Family.model(pipe))) and torch.equal(case.run(other), case.run(pipe))
        assert same(bits(model), kept)
        with pytest.raises(ValueError, match="part.safetensors"):
            case.method.load(nn.Linear(2, 2), path)


def what_is_left_can_be_tuned(case: Case) -> None:
    """A gradient reaches each parameter that had one before."""
    x0, conditions, _ = batch(case.family.name)
    reached = []
    for model in (Family.model(case.family.pipe()), Family.model(case.pipe()[0])):
        model.requires_grad_(True)
        model(x0, timestep=torch.full((len(x0),), 500), **conditions)[0].square().mean().backward()
        reached.append({name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()})
    assert reached[1] >= reached[0] & dict(model.named_parameters()).keys() != set()


def half_precision(case: Case) -> None:
    pipe = case.family.pipe()
    case.put(pipe, case.compressed(Family.model(pipe).to(torch.bfloat16)))
    assert {weight.dtype for weight in Family.model(pipe).parameters()} == {torch.bfloat16}
    assert case.run(pipe).isfinite().all()


def a_copy_stands_by_itself(case: Case) -> None:
    pipe, _ = case.pipe()
    out, other = case.run(pipe), copy.deepcopy(Family.model(pipe))
    for weight in other.parameters():
        weight.data.add_(0.1)
    assert torch.equal(case.run(pipe), out)
    case.put(pipe, other)
    assert not torch.equal(case.run(pipe), out)


def others_are_refused_in_words(case: Case) -> None:
    model = Family.model(case.family.pipe())
    before = bits(model)
    with pytest.raises((TypeError, ValueError), match=type(model).__name__):
        case.compressed(model)
    assert same(bits(model), before)


CHECKS = [off_is_the_identity, it_is_smaller, it_costs_less, it_takes_the_place_of_the_model, the_original_is_left_as_it_was,
          equal_inputs_give_equal_models, it_goes_into_a_file_and_back, what_is_left_can_be_tuned, half_precision,
          a_copy_stands_by_itself]
