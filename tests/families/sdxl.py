from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from families.making import WIDTH, Family, both, vae


def make(layers: int = 1) -> StableDiffusionXLPipeline:
    """As on SDXL no attention at full resolution, transformers of two layers, and conditions added to the time."""
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=layers, transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       timestep_spacing="leading", steps_offset=1)
    return StableDiffusionXLPipeline(vae(), *[None] * 4, model, scheduler, add_watermarker=False)


def call(batch: int, seed: int) -> dict:
    found = both(batch, seed)
    return found | {name.replace("prompt", "pooled_prompt"): value[:, 0] for name, value in found.items()}


FAMILY = Family("sdxl", make, ((32, 32), (32, 48)), call, image_to_image=StableDiffusionXLImg2ImgPipeline, row="unet")
