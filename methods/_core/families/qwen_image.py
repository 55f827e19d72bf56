from methods._core.families import Blocks, Family
from methods._core.families.clocks import share
from methods._core.families.grids import Shapes

FAMILY = Family("qwen-image", ("QwenImageTransformer2DModel",), (
    Blocks("transformer_blocks", "attn", "img_norm1", None, "img_mlp", "txt_mlp", text="apart",
           along={"image_rotary_emb.0": 0, "attention_mask": -1}, returns=("text", "image")),),
    Shapes(), clock=share, tail="norm_out", head="proj_out", batched=False)
