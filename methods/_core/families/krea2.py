from methods._core.families import Blocks, Family
from methods._core.families.clocks import share
from methods._core.families.grids import Packed

FAMILY = Family("krea2", ("Krea2Transformer2DModel",), (
    Blocks("transformer_blocks", "attn", cross=None, text="within", along={"image_rotary_emb": 0, "attention_mask": -1}),),
    Packed(ids="position_ids"), clock=share, batched=False)
