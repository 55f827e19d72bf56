from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("pixart", ("PixArtTransformer2DModel",), (Blocks("transformer_blocks"),), Grid(), embed="pos_embed",
                tail="norm_out", head="proj_out")
