from methods._core.families import Family
from methods._core.families.grids import Places

FAMILY = Family("animatediff", ("UNetMotionModel",), grid=Places(frames=2, per_frame=True), latent="sample", unet=True)
