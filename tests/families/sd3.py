from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from families import sdxl
from families.making import DIT, WIDTH, Family, vae


def make(layers: int = 3) -> StableDiffusion3Pipeline:
    model = SD3Transformer2DModel(**DIT, num_layers=layers, sample_size=16, joint_attention_dim=WIDTH,
                                  caption_projection_dim=32, pooled_projection_dim=WIDTH, pos_embed_max_size=24)
    return StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), vae(), *[None] * 6)


FAMILY = Family("sd3", make, ((32, 32), (32, 48)), sdxl.call, image_to_image=StableDiffusion3Img2ImgPipeline)
