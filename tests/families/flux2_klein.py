from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

from families import flux2
from families.making import Family, flux2_vae, text


def make(layers: int = 2) -> Flux2KleinPipeline:
    """Guided by two calls, whose prompts are of different lengths."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, flux2_vae(), None, None, flux2.transformer(layers, guidance_embeds=False),
                              is_distilled=False)


FAMILY = Family("flux2-klein", make, ((32, 48), (48, 64)), lambda batch, seed: dict(
    prompt_embeds=text(batch, seed), negative_prompt_embeds=text(batch, seed + 50, words=4)), row="flux2")
