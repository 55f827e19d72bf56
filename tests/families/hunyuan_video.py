from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from families.making import WIDTH, WORDS, Family, masks, text


def make(layers: int = 2) -> HunyuanVideoPipeline:
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=layers,
        num_single_layers=layers, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=WIDTH, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4))
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, spatial_compression_ratio=8,
        temporal_compression_ratio=4)
    return HunyuanVideoPipeline(None, None, model, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)


FAMILY = Family("hunyuan-video", make, ((48, 64), (64, 48)), lambda batch, seed: dict(
    prompt_embeds=text(batch, seed), pooled_prompt_embeds=text(batch, seed, words=1, width=8)[:, 0],
    prompt_attention_mask=masks(batch, words=WORDS)["prompt_attention_mask"], num_frames=9))
