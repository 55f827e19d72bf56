from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, DDIMScheduler

from families.making import WIDTH, Family, both, masks


def make(layers: int = 2) -> AllegroPipeline:
    model = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=layers, cross_attention_dim=24,
        sample_width=12, sample_height=8, sample_frames=8, caption_channels=WIDTH, patch_size=2, patch_size_t=1)
    vae = AutoencoderKLAllegro(
        latent_channels=4, sample_size=32, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4)
    return AllegroPipeline(None, None, vae, model, DDIMScheduler(clip_sample=False))


FAMILY = Family("allegro", make, ((64, 96), (96, 64)), lambda batch, seed: dict(
    **both(batch, seed), **masks(batch), negative_prompt=None, num_frames=8, clean_caption=False))
