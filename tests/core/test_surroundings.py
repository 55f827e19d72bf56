"""Adapters and offloading, put on before or after a patch, go on working, and the patch with them."""
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from families import FAMILIES
from peft import LoraConfig

from methods import deepcache, pfdiff, todo, tome

UNET = FAMILIES["unet"]
METHODS = [(tome, tome.Config()), (todo, todo.Config()), (deepcache, deepcache.Config(interval=2)), (pfdiff, pfdiff.Config())]


def adapt(pipe):
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))


@pytest.mark.parametrize("method, config", METHODS)
def test_lora_before_or_after_the_patch(method, config):
    plain, before, after = UNET.pipe(), UNET.pipe(), UNET.pipe()
    adapt(plain)
    expected = UNET.run(plain)
    adapt(before)
    with method.apply(before, config):
        first = UNET.run(before)
    with method.apply(after, config):
        without = UNET.run(after)
        adapt(after)
        assert torch.equal(UNET.run(after), first) and not torch.equal(without, first)
    assert torch.equal(UNET.run(before), expected) and torch.equal(UNET.run(after), expected)
    assert not torch.equal(first, expected)


@pytest.mark.parametrize("method, config", METHODS)
def test_offloading_before_or_after_the_patch(method, config):
    """What `enable_model_cpu_offload` does to a component, with the CPU standing in for the accelerator, and again after
    every run as pipelines do: the hooks come off and on around the patch."""
    plain = UNET.run(UNET.pipe())
    with method.apply(alone := UNET.pipe(), config):
        expected = UNET.run(alone)
    for patch_first in (False, True):
        pipe = UNET.pipe()
        if not patch_first:
            cpu_offload_with_hook(pipe.unet, "cpu")
        patch = method.apply(pipe, config)
        if patch_first:
            cpu_offload_with_hook(pipe.unet, "cpu")
        assert torch.equal(UNET.run(pipe), expected)
        remove_hook_from_module(pipe.unet)
        cpu_offload_with_hook(pipe.unet, "cpu")
        assert torch.equal(UNET.run(pipe), expected)
        assert patch.report()["state"] == "engaged"
        patch.remove()
        assert torch.equal(UNET.run(pipe), plain)
