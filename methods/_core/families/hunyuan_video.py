from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

ALONG = {"image_rotary_emb": 0, "attention_mask": (-2, -1)}
BOTH = ("image", "text")
LISTS = (
    Blocks("transformer_blocks", "attn", cross=None, ff_text="ff_context", text="apart", text_first=False, along=ALONG,
           returns=BOTH),
    Blocks("single_transformer_blocks", "attn", "norm", None, None, total=("proj_out", "attn", "proj_mlp"), text="apart",
           text_first=False, along=ALONG, returns=BOTH))

FAMILY = Family("hunyuan-video", ("HunyuanVideoTransformer3DModel",), LISTS, Grid(frames=2), tail="norm_out", head="proj_out",
                batched=False)
