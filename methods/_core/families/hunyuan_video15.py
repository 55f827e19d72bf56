from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("hunyuan-video-15", ("HunyuanVideo15Transformer3DModel",), (
    Blocks("transformer_blocks", "attn", cross=None, ff_text="ff_context", text="apart", text_first=False,
           along={"image_rotary_emb": 0, "attention_mask": (-2, -1)}, returns=("image", "text")),),
    Grid(frames=2), tail="norm_out", head="proj_out", batched=False)
