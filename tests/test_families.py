"""What the row of each model family says, proved on its tiny pipeline, with no method: see methods/_core/families.

A new row is a file there and a file in tests/families; it is proved here without a line more.
"""
from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from families import FAMILIES, Family

from methods._core.context import experts, split_target
from methods._core.denoiser import Denoiser, describe
from methods._core.families import families
from methods._core.patch import Patch
from methods._core.reduction import Reduction, reduce_all
from methods._core.tokens import join_plan

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
            denoiser.note(inputs)
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
    patches = []
    for target in experts(pipe):
        patch = Patch(target, "permute")
        blocks = [block for block in patch.denoiser.blocks if block.row.product != "none" and not block.temporal]
        order: dict[int, torch.Tensor] = {}

        def shuffle(x, order=order):
            n = x.shape[1]
            place = order.setdefault(n, torch.randperm(n, generator=torch.Generator().manual_seed(n)))[None]
            return join_plan(place, place[:, :0], place[:, :0], len(x))

        patches.append(reduce_all(patch, [Reduction(block, shuffle) for block in blocks],
                                  lambda context: lambda layer, grid: 1))
    shuffled = run(family, pipe)
    for patch in patches:
        patch.remove()
    assert distance(shuffled, plain) < 1e-5
    assert torch.equal(run(family, pipe), plain)


def _zero(module, args, out):
    return tuple(map(torch.zeros_like, out)) if isinstance(out, tuple) else torch.zeros_like(out)


@ALL
def test_without_its_branches_a_block_is_the_identity(family):
    """Finds a missing or a doubled branch, and streams that are named wrongly."""
    pipe, seen, handles = family.pipe(), [], []
    for model in family.models(pipe):
        for places in getattr(model, "learnable_pos_embed", torch.nn.Module()).parameters():     # Cosmos adds them anew
            places.zero_()
        for block in describe(model).blocks:
            handles += [branch.module.register_forward_hook(_zero) for branch in block.branches]
            if not block.row.alone:                                  # its attention is the branch
                handles.append(block.attn.register_forward_hook(_zero))

            def compare(module, args, kwargs, out, block=block):
                before, after = block.streams(args, kwargs), block.split(out)
                seen.extend(float((y - x).abs().max()) for x, y in zip(before, after, strict=True) if y is not None)
            handles.append(block.module.register_forward_hook(compare, with_kwargs=True))
    run(family, pipe)
    for handle in handles:
        handle.remove()
    assert seen and max(seen) < 1e-5


@pytest.mark.parametrize("family", [each for each in FAMILIES.values() if not describe(each.model(each.pipe())).unet],
                         ids=lambda each: each.name)
def test_a_changed_place_of_the_latent_moves_its_token(family):
    """Finds a wrong span of the image's tokens, grid, or side of a patch."""
    pipe, calls = family.pipe(), []
    with watched(pipe, lambda denoiser, inputs: calls.append((denoiser, inputs))):
        run(family, pipe)
    denoiser, inputs = calls[0]
    block = denoiser.blocks[0]
    frames, height, width = denoiser.grid(inputs, block)
    tokens = frames * height * width
    base = entering(denoiser, block, inputs)
    start = block.start(base.shape[1], tokens) if block.stream == "fused" else 0
    sample, patch = denoiser.sample(inputs), denoiser.row.grid.patch(denoiser.model)
    for place in ((0, 0), (0, width - 1), (height - 1, width - 1)):
        moved = sample.clone()
        at = [slice(None)] * sample.ndim
        if sample.ndim == 3:
            at[1] = sample.shape[1] - block.behind - tokens + place[0] * width + place[1]
        else:
            axis = denoiser.row.grid.height % sample.ndim if denoiser.row.grid.height < 0 else denoiser.row.grid.height
            at[axis], at[axis + 1] = place[0] * patch[1], place[1] * patch[2]
            if denoiser.row.grid.frames is not None and sample.ndim > 4:
                at[denoiser.row.grid.frames] = 0
        moved[tuple(at)] += 1.0
        changed = (entering(denoiser, block, inputs | denoiser.as_input(moved)) - base).abs().amax((0, 2)) > 1e-6
        found, token = changed.nonzero().flatten(), start + place[0] * width + place[1]
        assert token in found.tolist()
        assert len(found) == 1 or found.min() >= start and found.max() < start + tokens          # refiners mix before


class _Reached(Exception):
    pass


def entering(denoiser: Denoiser, block, inputs: dict) -> torch.Tensor:
    """What enters a block, (B, N, C)."""
    seen = []

    def reach(module, args):
        seen.append(args[0].movedim(block.row.sequence_axis, 1).clone())
        raise _Reached

    handle = block.norm.register_forward_pre_hook(reach)
    try:
        denoiser.model(**{name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()})
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


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
