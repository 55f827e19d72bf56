from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("wan-vace", ("WanVACETransformer3DModel",), (Blocks("blocks", ff="ffn", along={"rotary_emb": 1}),),
                Grid(frames=2), tail="norm_out", head="proj_out", batched=False, chained=False)
