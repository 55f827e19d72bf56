from diffusers import (
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance

from families.making import WIDTH, Family, both, masks


def make(layers: int = 2) -> HunyuanImagePipeline:
    model = HunyuanImageTransformer2DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
                                           num_layers=layers, num_single_layers=layers, num_refiner_layers=1,
                                           text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, rope_axes_dim=(4, 4))
    vae = AutoencoderKLHunyuanImage(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32),
                                    layers_per_block=1, spatial_compression_ratio=4, sample_size=32)
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.0)
    return HunyuanImagePipeline(FlowMatchEulerDiscreteScheduler(shift=7.0), vae, None, None, None, None, model, guider, guider)


def call(batch: int, seed: int) -> dict:
    second = {f"{name}_2": value for name, value in both(batch, seed, words=3).items()}
    return both(batch, seed) | second | masks(batch, "prompt_embeds_mask") | masks(batch, "prompt_embeds_mask_2", 3)


FAMILY = Family("hunyuan-image", make, ((32, 48), (48, 32)), call, guidance=None)
