from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("sd3", ("SD3Transformer2DModel",),
                (Blocks("transformer_blocks", "attn", cross=None, ff_text="ff_context", more=("attn2",), text="apart",
                        text_first=False, returns=("text", "image")),),
                Grid(), embed="pos_embed", tail="norm_out", head="proj_out")
