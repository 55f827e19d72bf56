from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("wan", ("WanTransformer3DModel", "WanAnimateTransformer3DModel"),
                (Blocks("blocks", ff="ffn", along={"rotary_emb": 1}),), Grid(frames=2), tail="norm_out", head="proj_out",
                batched=False)
