from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from families import wan
from families.making import Family, wan_vae


def make(layers: int = 3) -> WanPipeline:
    """Two experts, one for each end of the noise."""
    return WanPipeline(None, None, wan_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0), wan.transformer(layers),
                       wan.transformer(layers), boundary_ratio=0.7)


FAMILY = Family("wan22", make, ((64, 96), (96, 64)), wan.FAMILY.call, row="wan")
