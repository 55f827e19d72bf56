from methods._core.families import Blocks, Family
from methods._core.families.clocks import sigma_ratio
from methods._core.families.grids import Grid

FAMILY = Family("cosmos", ("CosmosTransformer3DModel",), (Blocks("transformer_blocks", along={"image_rotary_emb": 0}),),
                Grid(frames=2), clock=sigma_ratio, tail="norm_out", head="proj_out", batched=False, plain=False)
