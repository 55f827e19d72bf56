from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("cogvideox", ("CogVideoXTransformer3DModel",),
                (Blocks("transformer_blocks", cross=None, text="apart", along={"image_rotary_emb": 0},
                        returns=("image", "text")),),
                Grid(frames=1), embed="patch_embed", tail="norm_final", head="proj_out", cut={"image_rotary_emb": 0})
