import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from families import FAMILIES
from families.making import livelier, picture

from surroundings import Situation


def make() -> FluxControlNetPipeline:
    pipe = FAMILIES["flux"].pipe()
    torch.manual_seed(1)
    control = livelier(FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2))
    pipe = FluxControlNetPipeline(**pipe.components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SITUATION = Situation("ControlNet on FLUX", "flux", make, lambda pipe, moved, **more: FAMILIES["flux"].run(
    pipe, steps=6, **more, control_image=picture(moved)))
