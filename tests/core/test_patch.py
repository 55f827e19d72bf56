"""The patch itself, with the cases that a registry of hooks gets wrong."""
import copy
import pickle

import pytest
import torch
from families import FAMILIES

from methods import fora, tome
from methods._core.patch import Patch
from methods._core.site import Claim


@pytest.fixture
def model():
    return FAMILIES["dit"].pipe().transformer


def call(model):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return model(x, torch.tensor([10, 10]), torch.tensor([3, 4])).sample


def scaled(factor):
    return lambda forward, *args, **kwargs: forward(*args, **kwargs) * factor


def passing(forward, *args, **kwargs):
    return forward(*args, **kwargs)


@pytest.mark.parametrize("first_off", [0, 1])
def test_patches_come_off_in_any_order(model, first_off):
    plain, attn = call(model), model.transformer_blocks[1].attn1
    patches = [Patch(model, "outer"), Patch(model, "inner")]
    for patch, factor, claim in zip(patches, (2.0, 0.25), (Claim.OUTPUT, Claim.TOKENS), strict=True):
        patch.around(attn, scaled(factor), claim)
        patch.on()
    both = call(model)
    patches[first_off].remove()
    one = call(model)
    assert not torch.equal(one, both) and not torch.equal(one, plain)
    patches[1 - first_off].remove()
    assert torch.equal(call(model), plain)
    assert "forward" not in vars(attn) and "_patch_run" not in vars(model)


def test_caches_stand_outside_token_reducers_whatever_the_order(model):
    attn, order = model.transformer_blocks[0].attn1, []

    def note(name):
        def around(forward, *args, **kwargs):
            order.append(name)
            return forward(*args, **kwargs)
        return around

    tokens, cache = Patch(model, "tokens"), Patch(model, "cache")
    tokens.around(attn, note("tokens"), Claim.TOKENS)
    cache.around(attn, note("cache"), Claim.OUTPUT)
    with tokens.on(), cache.on():
        call(model)
    assert order == ["cache", "tokens"]


def test_a_failed_application_leaves_nothing(model):
    plain, attn = call(model), model.transformer_blocks[0].attn1
    one, two = Patch(model, "one"), Patch(model, "two")
    one.around(attn, passing)
    two.around(attn, passing)
    with one.on():
        with pytest.raises(ValueError, match="two and one cannot stack: both cache the output"):
            two.on()
        assert one.run.patches == [one]
    assert torch.equal(call(model), plain)


def test_another_librarys_forward_is_kept(model):
    """accelerate and others replace `forward` on the instance, before or after us."""
    attn = model.transformer_blocks[0].attn1
    before = attn.forward
    attn.forward = lambda *args, **kwargs: before(*args, **kwargs) * 3
    theirs = call(model)
    patch = Patch(model, "ours")
    patch.around(attn, passing)
    with patch.on():
        assert torch.equal(call(model), theirs)
    assert torch.equal(call(model), theirs)


def test_a_forward_put_over_ours_survives_our_removal(model):
    plain, attn = call(model), model.transformer_blocks[0].attn1
    patch = Patch(model, "ours")
    patch.around(attn, scaled(0.5))
    patch.on()
    ours = attn.forward
    attn.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    patch.remove()
    assert torch.equal(call(model), plain)
    again = Patch(model, "again")
    again.around(attn, scaled(0.5))
    with again.on():
        assert not torch.equal(call(model), plain)
    assert torch.equal(call(model), plain)


def test_an_unpatched_copy_has_its_own_weights(model):
    patch = Patch(model, "ours")
    patch.around(model.transformer_blocks[0].attn1, passing)
    with patch.on():
        with pytest.raises(RuntimeError, match="cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="cannot be copied"):
            copy.deepcopy(model.transformer_blocks[0])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer_blocks[0].attn1.to_v.weight.zero_()
    assert not torch.equal(call(twin), call(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_of_a_watched_scheduler_is_a_plain_one(duplicate):
    """Some pipelines step a copy of their scheduler for a second latent."""
    pipe = FAMILIES["dit"].pipe()
    plain = type(pipe.scheduler)
    with fora.apply(pipe) as patch:
        assert isinstance(pipe.scheduler, plain) and type(pipe.scheduler).__name__ == plain.__name__
        FAMILIES["dit"].run(pipe, steps=3)
        before, twin = patch.report(), duplicate(pipe.scheduler)
        twin.set_timesteps(7)
        assert patch.report() == before and len(pipe.scheduler.timesteps) == 3 and len(twin.timesteps) == 7
    assert type(pipe.scheduler) is plain and "_patch_watch" not in vars(pipe.scheduler)


def test_not_a_pipeline_is_named():
    with pytest.raises(TypeError, match="expected a diffusers pipeline .* not Linear|Linear is not a denoiser"):
        tome.apply(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="not str"):
        tome.apply("stable-diffusion")


def test_report_counts_what_runs_under_a_cache():
    """tome merges only where fora lets the attention run."""
    pipe = FAMILIES["dit"].pipe()
    ran = []
    for block in pipe.transformer.transformer_blocks:
        block.attn1.to_q.register_forward_hook(lambda m, a, out: ran.append(out.shape[1]))
    with tome.apply(pipe) as patch, fora.apply(pipe):
        FAMILIES["dit"].run(pipe, steps=7)
        assert patch.report()["merged"] == len(ran)
    assert set(ran) == {32}
