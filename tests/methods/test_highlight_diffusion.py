import contract
import pytest
import torch
from families import FAMILIES

from methods import highlight_diffusion as hd

ENGAGING = hd.Config(threshold=0.9, widen=0, margin=0)          # the maps of random models are scattered


@pytest.mark.parametrize("check, case", contract.cases(hd, ENGAGING), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("steps, partial, expected", [(10, (0,), list(range(10))), (7, (2,), [0, 3, 6]),
                                                      (10, (1, 3), [0, 2, 4, 6]), (8, (3, 0), [0, 4, 5, 6, 7])])
def test_full_steps(steps, partial, expected):
    assert hd.full_steps(steps, partial) == expected


def maps_of(word, tokens=4):
    """Attention (1, T, 8, 8): the first token everywhere, one word where given, the rest evenly small."""
    maps = torch.full((1, tokens, 8, 8), 0.01)
    maps[:, 0] = 0.9
    maps[0, 2][word] = 0.5
    return maps


def test_highlight_worked_by_hand():
    mask = hd.highlight(maps_of((slice(2, 4), slice(5, 6))), (8, 8), 0.5, 0)
    assert mask.nonzero()[:, 1:].tolist() == [[2, 5], [3, 5]]
    wide = hd.highlight(maps_of((slice(2, 4), slice(5, 6))), (8, 8), 0.5, 1)
    assert wide.nonzero()[:, 1:].tolist() == [[y, x] for y in range(1, 5) for x in range(4, 7)]
    fine = hd.highlight(maps_of((slice(2, 4), slice(5, 6))), (16, 16), 0.5, 0)
    assert fine[0, 4:8, 10:12].all() and fine.sum() < 4 * 4


def test_moving_the_map_moves_the_mask():
    here, there = (hd.highlight(maps_of((slice(y, y + 2), slice(3, 5))), (8, 8), 0.5, 1) for y in (2, 4))
    assert torch.equal(here.roll(2, 1), there) and here.any()


def test_an_even_map_highlights_nothing():
    assert not hd.highlight(torch.full((1, 4, 8, 8), 0.25), (8, 8), 0.0, 2).any()


def fixed(monkeypatch, mask):
    monkeypatch.setattr(hd, "highlight", lambda maps, *_: mask.expand(len(maps), -1, -1))


def outputs(name, config, steps=4, **setting):
    """Inputs and outputs of every call of the model in one patched run."""
    pipe, calls = FAMILIES[name].pipe(), []
    model = pipe.unet if name == "unet" else pipe.transformer
    names = ["sample" if name == "unet" else "hidden_states", "timestep"]

    def note(_, args, kwargs, out):
        calls.append((dict(zip(names, args, strict=False)) | kwargs, out[0] if isinstance(out, tuple) else out.sample))

    with hd.apply(pipe, config) as patch:
        model.register_forward_hook(note, with_kwargs=True)
        FAMILIES[name].run(pipe, steps=steps, **setting)
        return calls, patch.report()


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_a_partial_step_computes_the_box_and_keeps_the_rest(name, monkeypatch):
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 5:8, 6:7] = True
    fixed(monkeypatch, mask)
    calls, report = outputs(name, hd.Config(partial=(2,), margin=1))
    assert (report["full"], report["partial"]) == (2, 2)                        # steps 0 and 3
    rows, columns = slice(4, 12), slice(4, 8)                                   # 4:9 and 5:8, on multiples of 4
    if name == "pixart":
        rows = slice(4, 10)                                                     # on multiples of 2: 4:9 and 5:8
    twin = FAMILIES[name].pipe()
    model = twin.unet if name == "unet" else twin.transformer
    latent = "sample" if name == "unet" else "hidden_states"
    whole = calls[0][1]
    for inputs, out in calls[1:3]:
        assert torch.equal(out[:, :, ~mask[0]], whole[:, :, ~mask[0]])
        part = model(**{**inputs, latent: inputs[latent][..., rows, columns], "return_dict": False})[0]
        inside = mask[0, rows, columns]
        torch.testing.assert_close(out[..., rows, columns][:, :, inside], part[:, :, inside], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", [torch.zeros(1, 16, 16, dtype=torch.bool), torch.ones(1, 16, 16, dtype=torch.bool)])
def test_no_highlight_and_a_highlight_of_everything_are_full_steps(mask, monkeypatch):
    fixed(monkeypatch, mask)
    family = FAMILIES["unet"]
    pipe = family.pipe()
    with hd.apply(pipe) as patch:
        assert torch.equal(family.run(pipe, steps=4), family.run(family.pipe(), steps=4))
        assert patch.report()["full"] == 4


def test_the_maps_are_those_of_the_conditional_branch_at_the_level(monkeypatch):
    seen = []
    real = hd.highlight
    monkeypatch.setattr(hd, "highlight", lambda maps, *rest: seen.append(maps) or real(maps, *rest))
    pipe, ins = FAMILIES["unet"].pipe(), []
    blocks = [block for block in hd.describe(pipe.unet).blocks if block.level == 1]

    def note(module, args, kwargs, out):
        ins.append((module, args[0], kwargs["encoder_hidden_states"]))

    with hd.apply(pipe, hd.Config(partial=(1,))):
        for block in blocks:
            block.cross.register_forward_hook(note, with_kwargs=True)
        FAMILIES["unet"].run(pipe, steps=2)
    (maps,) = seen
    expected = torch.zeros(5, 64)
    for attn, x, text in ins[:len(blocks)]:
        q, k = attn.to_q(x[1]).unflatten(1, (attn.heads, -1)), attn.to_k(text[1]).unflatten(1, (attn.heads, -1))
        for h in range(attn.heads):
            expected += (q[:, h] @ k[:, h].T * q.shape[2] ** -0.5).softmax(-1).T / attn.heads / len(blocks)
    for half in maps:                                                           # both branches get the conditional one's
        torch.testing.assert_close(half, expected.view(5, 8, 8), atol=1e-5, rtol=1e-4)


def test_a_bare_model_and_a_patch_inside_are_refused():
    from methods import deepcache
    pipe = FAMILIES["unet"].pipe()
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        hd.apply(pipe.unet)
    with deepcache.apply(pipe), pytest.raises(ValueError, match="cannot stack"):
        hd.apply(pipe)


@pytest.mark.parametrize("wrong, named", [({"partial": ()}, "partial="), ({"threshold": 1.5}, "threshold=1.5"),
                                          ({"margin": -1}, "margin=-1")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        hd.Config(**wrong)
