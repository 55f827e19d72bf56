import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from families import FAMILIES
from families.making import livelier, picture

from surroundings import Situation


def make() -> StableDiffusionControlNetPipeline:
    pipe = FAMILIES["unet"].pipe()
    torch.manual_seed(1)
    control = livelier(ControlNetModel.from_unet(pipe.unet, conditioning_channels=3,
                                                 conditioning_embedding_out_channels=(16, 32)))
    pipe = StableDiffusionControlNetPipeline(**pipe.components, controlnet=control, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SITUATION = Situation("ControlNet on a UNet", "unet", make, lambda pipe, moved, **more: FAMILIES["unet"].run(
    pipe, steps=6, **more, image=picture(moved), height=32, width=32))
