from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("allegro", ("AllegroTransformer3DModel",), (
    Blocks("transformer_blocks", along={"image_rotary_emb": 1, "attention_mask": -1}),), Grid(frames=2), tail="norm_out",
    head="proj_out", shared=("image_rotary_emb",))
