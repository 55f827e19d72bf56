from methods._core.families import Family
from methods._core.families.grids import Grid
from methods._core.families.hunyuan_video import LISTS

FAMILY = Family("hunyuan-image", ("HunyuanImageTransformer2DModel",), LISTS, Grid(), tail="norm_out", head="proj_out",
                batched=False)
