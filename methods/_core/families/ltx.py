from methods._core.families import Blocks, Family
from methods._core.families.grids import Named

FAMILY = Family("ltx", ("LTXVideoTransformer3DModel",), (Blocks("transformer_blocks", along={"image_rotary_emb": -2}),),
                Named(), tail="norm_out", head="proj_out")
