from methods._core.families import Family
from methods._core.families.grids import Places

FAMILY = Family("unet", ("UNet2DConditionModel",), grid=Places(), latent="sample", unet=True)
