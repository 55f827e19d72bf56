import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from families import FAMILIES, FIRST, Family

from methods import pfdiff, tome
from methods._core.patch import Patch


def contexts(pipe, run):
    seen = []
    patch = Patch(pipe, "watch")
    patch.each_call(seen.append)
    with patch.on():
        run()
    return seen


@pytest.mark.parametrize("name", FIRST)
def test_steps_are_counted_from_both_ends(name):
    family = FAMILIES[name]
    pipe = family.pipe()
    seen = contexts(pipe, lambda: family.run(pipe, steps=5))
    assert [(c.i, c.left, c.steps, c.branch) for c in seen] == [(i, 4 - i, 5, (0,)) for i in range(5)]
    assert all(c.times == tuple(pipe.scheduler.timesteps[:5].tolist()) and c.t == c.times[c.i] for c in seen)
    assert [c.fresh for c in seen] == [True, False, False, False, False]
    assert all(c.guided == (name != "flux") for c in seen)


@pytest.mark.parametrize("scheduler, calls", [(PNDMScheduler, 6), (EulerDiscreteScheduler, 5), (HeunDiscreteScheduler, 9)])
def test_solvers_that_call_the_model_more_than_once_a_step(scheduler, calls):
    family = FAMILIES["unet"]
    pipe = family.pipe()
    pipe.scheduler = scheduler(**({"skip_prk_steps": True} if scheduler is PNDMScheduler else {}))
    seen = contexts(pipe, lambda: family.run(pipe, steps=5))
    assert [c.i for c in seen] == list(range(calls)) and {c.steps for c in seen} == {calls}


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_image_to_image_shortens_the_run(name):
    family = FAMILIES[name]
    pipe = family.second_pipe(family.pipe())
    image = torch.rand(1, 3, 32, 32)
    seen = contexts(pipe, lambda: family.run(pipe, steps=10, image=image, strength=0.4))
    assert [(c.i, c.steps) for c in seen] == [(i, 4) for i in range(4)]


def test_sequential_guidance_is_two_branches_of_one_step():
    family = FAMILIES["dit"]
    pipe = family.pipe()
    model, scheduler, x = pipe.transformer, pipe.scheduler, torch.randn(1, 4, 16, 16)

    def run():
        y = x
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            outs = [model(y, t.view(1), torch.tensor([label])).sample for label in (3, 1000)]
            y = scheduler.step(outs[1] + 2 * (outs[0] - outs[1]), t, y, return_dict=False)[0]

    seen = contexts(pipe, run)
    assert [(c.i, c.branch, c.fresh) for c in seen] == [(i, (b,), i == 0) for i in range(3) for b in (0, 1)]


def test_either_half_order_and_no_guidance_are_told_apart():
    family = FAMILIES["pixart"]
    pipe = family.pipe()
    assert all(c.guided for c in contexts(pipe, lambda: family.run(pipe, batch=2)))
    assert not any(c.guided for c in contexts(pipe, lambda: family.run(pipe, batch=2, guidance=1.0)))


def test_a_changed_batch_in_mid_run_is_fresh():
    pipe = FAMILIES["dit"].pipe()
    model, scheduler = pipe.transformer, pipe.scheduler

    def run():
        scheduler.set_timesteps(4)
        for i, t in enumerate(scheduler.timesteps):
            x = torch.randn(2 if i < 2 else 1, 4, 16, 16)
            scheduler.step(model(x, t.expand(len(x)), torch.zeros(len(x), dtype=torch.long)).sample, t, x)

    assert [c.fresh for c in contexts(pipe, run)] == [True, False, True, False]


def test_a_bare_model_counts_its_calls_until_reset():
    model, seen = FAMILIES["dit"].pipe().transformer, []
    x, t, label = torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.tensor([1])
    patch = Patch(model, "watch")
    patch.each_call(lambda c: seen.append((c.i, c.fresh, c.steps)))
    with patch.on():
        model(x, t, label)
        model(hidden_states=x, timestep=t, class_labels=label)
        patch.reset()
        model(x, t, label)
    assert seen == [(0, True, None), (1, False, None), (0, True, None)]


def test_calls_beyond_the_run_are_refused():
    pipe = FAMILIES["dit"].pipe()
    with Patch(pipe, "watch").on():
        FAMILIES["dit"].run(pipe, steps=2)
        with pytest.raises(RuntimeError, match="called from outside its pipeline's run"):
            pipe.transformer(torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.tensor([1]))
        FAMILIES["dit"].run(pipe, steps=2)


def test_the_latent_grid_is_read_not_guessed():
    grids = {}
    for name in FIRST:
        family = FAMILIES[name]
        from methods._core.denoiser import describe
        pipe = family.pipe()
        denoiser = describe(Family.model(pipe))
        seen = contexts(pipe, lambda family=family, pipe=pipe: family.run(pipe, steps=1, size=family.sizes[1]))
        grids[name] = denoiser.grid(seen[0].inputs, denoiser.blocks[0])
    assert grids == {"unet": (1, 16, 24), "sdxl": (1, 8, 12), "dit": (1, 8, 8), "pixart": (1, 8, 12), "sd3": (1, 8, 12),
                     "flux": (1, 8, 12), "latte": (1, 8, 12), "cogvideox": (3, 4, 4)}


@pytest.mark.parametrize("method", [tome, pfdiff])
def test_a_denoiser_that_is_replaced_under_a_patch_is_noticed(method):
    """What would do nothing, or half, says so at the first step; the replaced model stays free."""
    pipe, other = FAMILIES["sd3"].pipe(), FAMILIES["sd3"].pipe().transformer
    patched, expected = pipe.transformer, FAMILIES["sd3"].run(FAMILIES["sd3"].pipe())
    with method.apply(pipe):
        pipe.transformer = other
        with pytest.raises(RuntimeError, match="was replaced under a patch"):
            FAMILIES["sd3"].run(pipe)
    assert torch.equal(FAMILIES["sd3"].run(pipe), expected)
    pipe.transformer = patched
    assert torch.equal(FAMILIES["sd3"].run(pipe), expected)


def test_a_second_pipeline_may_step_with_the_scheduler_of_a_patched_one():
    first, second = FAMILIES["sd3"].pipe(), FAMILIES["sd3"].pipe()
    expected, second.scheduler = FAMILIES["sd3"].run(second), first.scheduler
    with tome.apply(first) as patch:
        merged = FAMILIES["sd3"].run(first)
        assert torch.equal(FAMILIES["sd3"].run(second), expected)
        assert torch.equal(FAMILIES["sd3"].run(first), merged) and patch.report()["state"] == "engaged"
