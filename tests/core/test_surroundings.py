"""Adapters and offloading, put on before or after a patch, go on working, and the patch with them."""
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from contracts import patch as contract
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from families import FAMILIES, Family
from peft import LoraConfig

from methods import fora

pytestmark = pytest.mark.slow

SETTING = dict(steps=contract.STEPS + 1)


def cells(*names, able=""):
    """Each method on the first of these families on which it works, or on the first of all whose model is `able`."""
    for method in contract.patches():
        families = [family for family in contract.working(method) if not able or hasattr(Family.model(family.pipe()), able)]
        family = next((family for name in names for family in families if family.name == name), next(iter(families), None))
        if family is not None:
            yield pytest.param(method, family, id=f"{contract.slug(method)}-{family.name}")


def adapt(pipe):
    torch.manual_seed(1)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    Family.model(pipe).add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))


@pytest.mark.parametrize("method, family", cells("unet", "sd3", "flux", able="add_adapter"))
def test_lora_before_or_after_the_patch(method, family):
    config, setting = contract.engaging(method), SETTING | contract.several(method)
    plain, before, after = (family.pipe() for _ in range(3))
    adapt(plain)
    expected = family.run(plain, **setting)
    adapt(before)
    with method.apply(before, config):
        first = family.run(before, **setting)
    with method.apply(after, config):
        without = family.run(after, **setting)
        adapt(after)
        assert torch.equal(family.run(after, **setting), first) and not torch.equal(without, first)
    assert torch.equal(family.run(before, **setting), expected) and torch.equal(family.run(after, **setting), expected)
    assert not torch.equal(first, expected)


@pytest.mark.parametrize("method, family", cells("dit", "unet"))
def test_offloading_before_or_after_the_patch(method, family):
    """What `enable_model_cpu_offload` does to a component, with the CPU standing in for the accelerator, and again after
    every run as pipelines do: the hooks come off and on around the patch. So too on every attention, as sequentially."""
    config, setting = contract.engaging(method), SETTING | contract.several(method)
    plain = family.run(family.pipe(), **setting)
    with method.apply(alone := family.pipe(), config):
        expected = family.run(alone, **setting)
    for patch_first in (False, True):
        pipe = family.pipe()
        model = Family.model(pipe)
        parts = [model, *(module for name, module in model.named_modules() if name.endswith(("attn", "attn1", "ff")))]
        if not patch_first:
            hook(parts)
        patch = method.apply(pipe, config)
        if patch_first:
            hook(parts)
        assert torch.equal(family.run(pipe, **setting), expected)
        for part in parts:
            remove_hook_from_module(part)
        assert torch.equal(family.run(pipe, **setting), expected)
        hook(parts)
        assert torch.equal(family.run(pipe, **setting), expected)
        assert patch.report()["state"] == "engaged"
        patch.remove()
        assert torch.equal(family.run(pipe, **setting), plain)
        for part in parts:
            remove_hook_from_module(part)
        assert torch.equal(family.run(pipe, **setting), plain)


def hook(parts):
    for part in parts:
        cpu_offload_with_hook(part, "cpu")


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(threshold=0.1), PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)], ids=["first_block", "pab"])
def test_a_cache_of_diffusers_and_a_patch_refuse_each_other(config):
    family = FAMILIES["flux"]
    pipe, plain = family.pipe(), family.run(family.pipe(), **SETTING)
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="a cache of diffusers is enabled"):
        fora.apply(pipe)
    pipe.transformer.disable_cache()
    with fora.apply(pipe):
        pipe.transformer.enable_cache(config)
        with pytest.raises(RuntimeError, match="a cache of diffusers is enabled"):
            family.run(pipe, **SETTING)
        pipe.transformer.disable_cache()
        assert not torch.equal(family.run(pipe, **SETTING), plain)
    assert torch.equal(family.run(pipe, **SETTING), plain)
