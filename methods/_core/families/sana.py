from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("sana", ("SanaTransformer2DModel",), (Blocks("transformer_blocks", product="none"),), Grid(), tail="norm_out",
                head="proj_out")
