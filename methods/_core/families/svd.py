from methods._core.families import Family
from methods._core.families.grids import Places

FAMILY = Family("svd", ("UNetSpatioTemporalConditionModel",), grid=Places(frames=1, per_frame=True), latent="sample", unet=True)
