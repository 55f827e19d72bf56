from methods._core.families import Blocks, Family
from methods._core.families.clocks import share_done
from methods._core.families.grids import Grid

FAMILY = Family("lumina2", ("Lumina2Transformer2DModel",), (
    Blocks("layers", "attn", "norm1", None, "feed_forward", text="within",
           along={"image_rotary_emb": 1, "attention_mask": -1}),),
    Grid(), clock=share_done, tail="norm_out", batched=False)
