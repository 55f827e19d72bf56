from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("cogview4", ("CogView4Transformer2DModel",), (
    Blocks("transformer_blocks", cross=None, text="apart", along={"image_rotary_emb": 0}, returns=("image", "text"),
           shared=True),),
    Grid(), tail="norm_out", head="proj_out", batched=False)
