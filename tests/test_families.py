"""What the row of each model family says, proved on its tiny pipeline, with no method: see methods/_core/families.

A new row is a file there and a file in tests/families; it is proved here without a line more.
"""
from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from contextlib import contextmanager
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers.models import transformers, unets
from families import FAMILIES, Family

from methods._core.context import experts, split_target
from methods._core.denoiser import describe
from methods._core.families import families
from methods._core.guess import misplaced, permuted, silent

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
STEPS = 2
ROOT = Path(__file__).parents[1]


def size(family: Family):
    return family.sizes[1]


def run(family: Family, pipe, **more) -> torch.Tensor:
    return family.run(pipe, steps=STEPS, size=size(family), **more)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@contextmanager
def watched(pipe, act):
    """Call `act(denoiser, inputs)` before each call of each denoiser, with its arguments by name."""
    handles = []
    for target in experts(pipe):
        _, model = split_target(target)
        denoiser, signature = describe(model), inspect.signature(type(model).forward)

        def see(module, args, kwargs, denoiser=denoiser, signature=signature):
            inputs = dict(signature.bind(module, *args, **kwargs).arguments)
            del inputs["self"]
            denoiser.note(denoiser.behind(inputs))
            act(denoiser, inputs)
        handles.append(model.register_forward_pre_hook(see, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_every_row_has_a_pipeline():
    """And every class a row that is found by its name."""
    known = {family.row or family.name for family in FAMILIES.values()}
    assert {row.name for row in families().values()} == known
    assert set(FAMILIES) <= set(yaml.safe_load((ROOT / "catalog/vocab.yaml").read_text())["model"]["terms"])


@ALL
def test_a_permutation_of_the_tokens_changes_nothing(family):
    """Finds a wrong axis of a table or mask, and a wrong order of image and words."""
    pipe = family.pipe()
    plain = run(family, pipe)
    with permuted(pipe):
        shuffled = run(family, pipe)
    assert distance(shuffled, plain) < 1e-5
    assert torch.equal(run(family, pipe), plain)


@ALL
def test_without_its_branches_a_block_is_the_identity(family):
    """Finds a missing or a doubled branch, and streams that are named wrongly."""
    pipe = family.pipe()
    for model in family.models(pipe):
        for places in getattr(model, "learnable_pos_embed", torch.nn.Module()).parameters():     # Cosmos adds them anew
            places.zero_()
    assert silent(family.models(pipe), lambda: run(family, pipe)) < 1e-5


@pytest.mark.parametrize("family", [each for each in FAMILIES.values() if not describe(each.model(each.pipe())).unet],
                         ids=lambda each: each.name)
def test_a_changed_place_of_the_latent_moves_its_token(family):
    """Finds a wrong span of the image's tokens, grid, or side of a patch."""
    pipe, calls = family.pipe(), []
    with watched(pipe, lambda denoiser, inputs: calls.append((denoiser, inputs))):
        run(family, pipe)
    assert misplaced(*calls[0]) == ""


@pytest.mark.slow
@ALL
def test_the_models_time_and_latent_are_the_schedulers(family, monkeypatch):
    pipe, seen, stepped = family.pipe(), [], []
    step = type(pipe.scheduler).step

    def watch(self, output, t, sample, *args, **kwargs):
        if self is pipe.scheduler:                                    # and not a copy of it, for sound
            stepped.append((float(t), sample.clone(), len(seen)))
        return step(self, output, t, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", watch)
    with watched(pipe, lambda denoiser, inputs: seen.append((denoiser, inputs))):
        run(family, pipe)
    assert len(stepped) == STEPS
    sigmas, first = getattr(pipe.scheduler, "sigmas", None), 0
    for i, (t, sample, last) in enumerate(stepped):
        for denoiser, inputs in seen[first:last]:
            sigma = None if sigmas is None else float(sigmas[i])
            told = denoiser.row.clock(t, sigma, pipe.scheduler.config.num_train_timesteps)
            time = torch.as_tensor(inputs[denoiser.row.time]).double()
            assert math.isclose(float(time.max()), told, rel_tol=1e-3, abs_tol=1e-3)
            if denoiser.row.plain and denoiser.row.latents == 1 and not hasattr(pipe.scheduler, "is_scale_input_called"):
                x = denoiser.sample(inputs)
                sample = sample if sample.ndim == x.ndim else sample.view(len(sample), *x.shape[1:])
                own = x[(slice(len(sample)), *(slice(n) for n in sample.shape[1:]))]
                torch.testing.assert_close(own.float(), sample.float(), rtol=1e-4, atol=1e-4)
        first = last


def test_every_class_of_diffusers_has_a_row_or_a_reason():
    """Transformers and UNets of the release that is installed; in an older one, those it has."""
    listed = yaml.safe_load((ROOT / "catalog/classes.yaml").read_text())
    reasons = [name for each in listed for name in each["classes"]]
    there = {name for package in (transformers, unets) for module in pkgutil.iter_modules(package.__path__)
             for name, found in vars(importlib.import_module(f"{package.__name__}.{module.name}")).items()
             if inspect.isclass(found) and issubclass(found, diffusers.ModelMixin)
             and found.__module__ == f"{package.__name__}.{module.name}" and not module.name.endswith("_flax")}
    assert len(reasons) == len(set(reasons)) and not set(reasons) & families().keys()
    assert there <= families().keys() | set(reasons)
    assert all(each["reason"].endswith(".") for each in listed)
