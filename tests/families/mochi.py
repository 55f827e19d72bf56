import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from families.making import WIDTH, WORDS, Family, both, masks


def make(layers: int = 3) -> MochiPipeline:
    model = MochiTransformer3DModel(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=layers,
                                    pooled_projection_dim=16, in_channels=12, out_channels=None, qk_norm="rms_norm",
                                    text_embed_dim=WIDTH, time_embed_dim=4, activation_fn="swiglu", max_sequence_length=WORDS)
    vae = AutoencoderKLMochi(latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4,
                             decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    return MochiPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, model)


FAMILY = Family("mochi", make, ((64, 96), (96, 64)), lambda batch, seed: dict(
    **both(batch, seed), **masks(batch, dtype=torch.bool), num_frames=7))
