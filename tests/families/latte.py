from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

from families.making import DIT, WIDTH, Family, both, vae


def make(layers: int = 2) -> LattePipeline:
    model = LatteTransformer3DModel(**DIT | {"out_channels": 8}, num_layers=layers, sample_size=16, caption_channels=WIDTH,
                                    cross_attention_dim=32, video_length=4, activation_fn="gelu-approximate",
                                    norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
                                    attention_bias=True)
    return LattePipeline(None, None, vae(), model, DDIMScheduler(clip_sample=False))


FAMILY = Family("latte", make, ((32, 32), (32, 48)), lambda batch, seed: dict(
    **both(batch, seed), negative_prompt=None, video_length=4, clean_caption=False, mask_feature=False))
