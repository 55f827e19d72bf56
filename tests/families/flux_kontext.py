import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

from families import flux
from families.making import Family, vae


def make(layers: int = 2) -> FluxKontextPipeline:
    """Edits an image, whose tokens follow those of the result and are of another size."""
    return FluxKontextPipeline(FlowMatchEulerDiscreteScheduler(), vae(), None, None, None, None, flux.make(layers).transformer)


def call(batch: int, seed: int) -> dict:
    picture = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(seed))
    return dict(**flux.call(batch, seed), image=picture, max_area=32 * 48, _auto_resize=False)


FAMILY = Family("flux-kontext", make, ((32, 48), (48, 32)), call, scale=3.5, row="flux")
