import torch
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter
from families import FAMILIES
from families.making import livelier, picture

from surroundings import Situation


def make() -> StableDiffusionAdapterPipeline:
    torch.manual_seed(1)
    adapter = livelier(T2IAdapter(in_channels=3, channels=[32, 32, 64], num_res_blocks=1, downscale_factor=2))
    parts = {name: part for name, part in FAMILIES["unet"].pipe().components.items() if name != "image_encoder"}
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SITUATION = Situation("T2I-Adapter", "unet", make, lambda pipe, moved, **more: FAMILIES["unet"].run(
    pipe, steps=6, **more, image=[picture(moved)] * more.get("batch", 1), height=32, width=32))
