from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance

from families.making import WIDTH, Family, both, masks


def make(layers: int = 3) -> HunyuanVideo15Pipeline:
    model = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=layers, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=WIDTH, text_embed_2_dim=32, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v")
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False)
    return HunyuanVideo15Pipeline(None, None, model, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None,
                                  ClassifierFreeGuidance(guidance_scale=4.0))


def call(batch: int, seed: int) -> dict:
    second = {f"{name}_2": value for name, value in both(batch, seed, words=3, width=32).items()}
    return both(batch, seed) | second | masks(batch, "prompt_embeds_mask") | masks(batch, "prompt_embeds_mask_2", 3)


FAMILY = Family("hunyuan-video-15", make, ((32, 48), (48, 32)), lambda batch, seed: call(batch, seed) | {"num_frames": 5},
                guidance=None)
