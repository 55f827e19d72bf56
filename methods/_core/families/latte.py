from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("latte", ("LatteTransformer3DModel",),
                (Blocks("transformer_blocks"), Blocks("temporal_transformer_blocks", temporal=True)),
                Grid(frames=2, per_frame=True), embed="pos_embed", tail="norm_out", head="proj_out", interleaved=True)
