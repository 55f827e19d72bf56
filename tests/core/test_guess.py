"""A class without a row is described from two steps of its pipeline, as well as its row does, or refused in words."""
import dataclasses

import pytest
import torch
from families import FAMILIES

import methods
from methods import fora, tome
from methods._core.denoiser import describe
from methods._core.families import Blocks, Family, families, find
from methods._core.families.clocks import share
from methods._core.families.grids import Grid, Packed, Unknown
from methods._core.guess import _known, _permutation, misplaced, silent, source, study
from methods._core.patch import Patch

NOT_GUESSED = ("name", "classes", "embed", "tail", "head", "cut", "lists")             # lists are compared one by one


def unknown(name: str, monkeypatch, **more):
    """(pipeline of a family whose class has lost its row, its run of two steps, the row it had)"""
    family = FAMILIES[name]
    pipe = family.pipe(**more)
    row = find(type(family.model(pipe)))
    for each in row.classes:
        monkeypatch.delitem(families(), each)                              # and back again, whatever was guessed
    return pipe, lambda **how: family.run(pipe, **{"steps": 2, "size": family.sizes[1]} | how), row


def parts(blocks: Blocks, module: torch.nn.Module) -> dict:
    """What a list says of the modules that it has."""
    there = {name: value for name in ("attn", "norm", "cross", "ff", "ff_text") if (value := getattr(blocks, name))
             and getattr(module, value, None) is not None}
    return there | {"more": tuple(name for name in blocks.more if getattr(module, name, None) is not None)} | {
        name: getattr(blocks, name) for name in ("at", "total", "text", "text_first", "returns", "product", "alone", "shared")}


@pytest.mark.parametrize("name", ["wan", "flux", "pixart", "qwen-image", "sd3", "chroma", "dit", "mochi", "ideogram4"])
def test_it_finds_what_the_row_says(name, monkeypatch):
    pipe, run, row = unknown(name, monkeypatch)
    model = FAMILIES[name].model(pipe)
    with pytest.raises(TypeError, match=r"methods\.guess\(pipe, run\).*tools/new_family\.py"):
        fora.apply(pipe)
    found = methods.guess(pipe, run)
    assert found.proved and describe(model).row is found.row
    for each in dataclasses.fields(Family):
        if each.name not in NOT_GUESSED:
            told = getattr(row, each.name) if each.name != "by_sample" else row.by_sample and row.batched
            assert getattr(found.row, each.name) == told, each.name
    with _known(row):
        firsts = {block.row.at: block.module for block in reversed(describe(model).blocks)}
    for mine, theirs in zip(found.row.lists, row.lists, strict=True):
        assert parts(mine, firsts[mine.at]) == parts(theirs, firsts[theirs.at])
        seen = {place: axis for place, axis in theirs.along.items() if place in mine.along}
        assert mine.along == seen and (seen or not theirs.along)           # a mask may not have been given


@pytest.mark.parametrize("name, method, config", [
    ("pixart", fora, fora.Config()), ("qwen-image", fora, fora.Config()), ("wan", tome, tome.Config(ratio=0.4)),
    ("flux", tome, tome.Config(ratio=0.4))])
def test_methods_do_on_it_what_they_do_on_the_row(name, method, config, monkeypatch):
    pipe, run, row = unknown(name, monkeypatch)
    plain = run(steps=4)
    with _known(row), method.apply(pipe, config) as patch:
        told, said = run(steps=4), patch.report()
    assert said["state"] == "engaged" and not torch.equal(told, plain)
    methods.guess(pipe, run)
    with method.apply(pipe, config) as patch:
        assert torch.equal(run(steps=4), told) and patch.report() == said


@pytest.mark.parametrize("name, reason", [
    ("unet", "a UNet"), ("sana", "no self-attention by a scaled dot product"), ("latte", "called with 4 tokens"),
    ("cosmos", "a proof failed"), ("ltx2", "not the image and the words")])
def test_it_refuses_what_it_cannot_prove(name, reason, monkeypatch):
    pipe, run, _ = unknown(name, monkeypatch)
    with pytest.raises(ValueError, match=f"no row. .*{reason}"):
        methods.guess(pipe, run)
    with pytest.raises(TypeError, match="not a denoiser this library knows"):
        describe(FAMILIES[name].model(pipe))


def test_where_the_span_is_not_proved_tokens_are_left_alone(monkeypatch):
    pipe, run, _ = unknown("wan", monkeypatch)
    pipe.to(torch.bfloat16)
    found = methods.guess(pipe, run)
    assert not found.proved and isinstance(found.row.grid, Unknown)
    assert "permutation  FAILED: rounding in torch.bfloat16" in found.text()
    with pytest.raises(ValueError, match="has no self-attention"):
        tome.apply(pipe)
    with pytest.raises(ValueError, match="which tokens"):
        patch = Patch(pipe, "within")
        patch.attend(patch.denoiser.blocks[0].attn, lambda product, q, k, v, **more: product(q, k, v, **more))
    with fora.apply(pipe) as patch:
        run(steps=4)
        assert patch.report()["state"] == "engaged"


def test_the_proofs_can_fail(monkeypatch):
    pipe, run, row = unknown("wan", monkeypatch)
    plain, calls = [], []

    def see(module, args, kwargs, out):
        plain.append(out[0])
        calls.append(kwargs)

    handle = pipe.transformer.register_forward_hook(see, with_kwargs=True)
    run()
    handle.remove()
    right, wrong = plain, dataclasses.replace
    blocks = row.lists[0]
    assert _permutation(row, pipe, [pipe.transformer], run, right)[0]
    assert not _permutation(wrong(row, lists=(wrong(blocks, along={}),)), pipe, [pipe.transformer], run, right)[0]
    with _known(wrong(row, lists=(wrong(blocks, cross=None),))):
        assert silent([pipe.transformer], run) > 1e-3
    for grid in (Grid(frames=2), Grid(frames=1)):
        with _known(wrong(row, grid=grid)):
            assert bool(misplaced(describe(pipe.transformer), calls[0])) is (grid != row.grid)
    assert type(pipe.transformer).__name__ not in families()


def test_it_says_what_it_cannot_watch(monkeypatch):
    known = FAMILIES["pixart"].pipe()
    with pytest.raises(ValueError, match="PixArtTransformer2DModel has a row"):
        methods.guess(known, lambda: None)
    pipe, run, _ = unknown("wan", monkeypatch)
    with pytest.raises(TypeError, match="not a bare WanTransformer3DModel"):
        study(pipe.transformer, run)
    assert "it made 3" in study(pipe, lambda: run(steps=3)).reason
    assert "it made 0" in study(pipe, lambda: None).reason
    assert type(pipe.scheduler).__module__.startswith("diffusers") and "step" not in vars(pipe.scheduler)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


def test_a_row_is_told_as_python():
    row = Family("x", ("X",), (Blocks("blocks", cross=None, along={"m": (-2, -1)}),), Packed(), clock=share)
    assert source(row) == ('Family(name="x", classes=("X",), lists=(Blocks(at="blocks", cross=None, along={"m": (-2, -1)}),), '
                           'grid=Packed(), clock=share)')
