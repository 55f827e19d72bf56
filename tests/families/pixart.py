from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

from families.making import DIT, WIDTH, Family, both, masks, vae


def make(layers: int = 3) -> PixArtAlphaPipeline:
    model = PixArtTransformer2DModel(**DIT, num_layers=layers, sample_size=16, caption_channels=WIDTH,
                                     cross_attention_dim=32, use_additional_conditions=False)
    return PixArtAlphaPipeline(None, None, vae(), model, DDIMScheduler(clip_sample=False))


FAMILY = Family("pixart", make, ((32, 32), (32, 48)), lambda batch, seed: dict(
    **both(batch, seed), **masks(batch), negative_prompt=None, use_resolution_binning=False))
