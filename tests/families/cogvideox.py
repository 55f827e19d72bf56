from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models import AutoencoderKLCogVideoX

from families.making import DIT, WIDTH, WORDS, Family, both


def make(layers: int = 3) -> CogVideoXPipeline:
    model = CogVideoXTransformer3DModel(**DIT, num_layers=layers, time_embed_dim=8, text_embed_dim=WIDTH, sample_width=12,
                                        sample_height=8, sample_frames=9, temporal_compression_ratio=4,
                                        max_text_seq_length=WORDS, use_rotary_positional_embeddings=True)
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)
    return CogVideoXPipeline(None, None, vae, model, CogVideoXDDIMScheduler())


FAMILY = Family("cogvideox", make, ((64, 96), (64, 64)), lambda batch, seed: dict(**both(batch, seed), num_frames=9))
