from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("mochi", ("MochiTransformer3DModel",), (
    Blocks("transformer_blocks", cross=None, ff_text="ff_context", text="apart", text_first=False,
           along={"image_rotary_emb": 0}, returns=("image", "text"), product="each"),),
    Grid(frames=2), tail="norm_out", head="proj_out")
