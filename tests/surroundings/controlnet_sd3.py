import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from families import FAMILIES
from families.making import livelier, picture

from surroundings import Situation


def make() -> StableDiffusion3ControlNetPipeline:
    pipe = FAMILIES["sd3"].pipe()
    torch.manual_seed(1)
    control = livelier(SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=2, num_extra_conditioning_channels=0))
    pipe = StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SITUATION = Situation("ControlNet on SD3", "sd3", make, lambda pipe, moved, **more: FAMILIES["sd3"].run(
    pipe, steps=6, **more, control_image=picture(moved)))
