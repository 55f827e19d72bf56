from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("dit", ("DiTTransformer2DModel",), (Blocks("transformer_blocks"),), Grid(), embed="pos_embed", tail="norm_out",
                head="proj_out_2", cond_first=True)
