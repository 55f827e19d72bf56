from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from families.making import DIT, Family
from methods._zoo.pixel_vae import PixelVAE


def make(layers: int = 3) -> DiTPipeline:
    model = DiTTransformer2DModel(**DIT, num_layers=layers, sample_size=16, num_embeds_ada_norm=1000)
    return DiTPipeline(model, PixelVAE(), DDIMScheduler(clip_sample=False))


FAMILY = Family("dit", make, (None, None), lambda batch, seed: dict(
    class_labels=[(seed + i) % 10 for i in range(batch)], output_type="np"))
