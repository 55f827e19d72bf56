from methods._core.families import Blocks, Family
from methods._core.families.clocks import share_done
from methods._core.families.grids import Marked

FAMILY = Family("ideogram4", ("Ideogram4Transformer2DModel",), (
    Blocks("layers", "attention", "attention_norm1", None, "feed_forward", text="within",
           along={"image_rotary_emb": 1, "attention_mask": (-2, -1)}),),
    Marked(), clock=share_done, batched=False, plain=False)
