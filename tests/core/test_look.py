"""What the first block attends to, known before the call of the model is made."""
import pytest
import torch
from families import FAMILIES

from methods import pfdiff, tome
from methods._core.patch import Patch
from methods._core.site import Claim

CHAINS = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]


def watching(pipe):
    """A patch that looks before every call, and notes what the first attention then gets: (patch, looked, given)."""
    patch, looked, given = Patch(pipe, "watch"), [], []

    def note(forward, *args, **kwargs):
        given.append(args[0] if args else kwargs["hidden_states"])
        return forward(*args, **kwargs)

    patch.around(patch.denoiser.blocks[0].attn, note, Claim.OUTPUT)
    patch.each_call(lambda context: looked.append(patch.look(context)))
    return patch.on(), looked, given


def attributes(pipe):
    return {name: sorted(vars(module)) for name, module in pipe.transformer.named_modules()}


@pytest.mark.parametrize("name", CHAINS)
def test_it_is_what_the_first_attention_gets(name):
    family = FAMILIES[name]
    pipe, calls = family.pipe(), []
    plain = family.run(pipe, steps=3)
    before = attributes(pipe)
    patch, looked, given = watching(pipe)
    with patch:
        patch.after_call(lambda context, out: calls.append((context.i, context.call)))
        assert torch.equal(family.run(pipe, steps=3), plain)
    assert before == attributes(pipe)
    assert sorted({i for i, _ in calls}) == [0, 1, 2] and len(set(calls)) == len(calls)
    assert len(looked) == len(given) == len(calls)
    assert all(torch.equal(a, b) for a, b in zip(looked, given, strict=True))
    assert not torch.equal(looked[0], looked[-1])


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_it_is_that_of_the_call_really_made(name, first):
    """A solver moves the latent and the timestep; whoever is put on first, the look is at where it moved them."""
    family = FAMILIES[name]
    pipe = family.pipe()
    solver = pfdiff.apply(pipe, pfdiff.Config(k=2, h=2)) if first == 0 else None
    patch, looked, given = watching(pipe)
    solver = solver or pfdiff.apply(pipe, pfdiff.Config(k=2, h=2))
    with patch, solver:
        family.run(pipe, steps=7)
        assert solver.report()["state"] == "engaged"
    assert 1 < len(looked) < 7 and all(torch.equal(a, b) for a, b in zip(looked, given, strict=True))


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_other_patches_change_nothing_of_it(name):
    """The first look, before any change of the latent, is that of the plain model."""
    family, firsts = FAMILIES[name], []
    for reduce in (False, True):
        pipe = family.pipe()
        merged = tome.apply(pipe, tome.Config(ratio=0.5)) if reduce else None
        patch, looked, _ = watching(pipe)
        family.run(pipe, steps=2)
        firsts.append(looked[0])
        assert merged is None or merged.report()["state"] == "engaged"
        patch.remove()
    assert torch.equal(*firsts)


def test_the_first_block_may_be_passed_over():
    """The extra call of skip-layer guidance has another first block."""
    family, pipe = FAMILIES["sd3"], FAMILIES["sd3"].pipe()
    patch, looked, given = watching(pipe)
    with patch:
        family.run(pipe, steps=2, skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    assert len(looked) > len(given) > 0


def test_blocks_may_be_compiled():
    family, pipe = FAMILIES["dit"], FAMILIES["dit"].pipe()
    torch._dynamo.reset()
    for block in pipe.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    patch, looked = Patch(pipe, "watch"), []
    patch.each_call(lambda context: looked.append(patch.look(context)))
    with patch.on():
        family.run(pipe, steps=3)
    torch._dynamo.reset()
    patch, expected, _ = watching(eager := family.pipe())
    family.run(eager, steps=3)
    for a, b in zip(looked, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
