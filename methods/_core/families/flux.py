from methods._core.families import Blocks, Family
from methods._core.families.clocks import share
from methods._core.families.grids import Packed

TABLE = {"image_rotary_emb": 0}

FAMILY = Family("flux", ("FluxTransformer2DModel",), (
    Blocks("transformer_blocks", "attn", cross=None, ff_text="ff_context", text="apart", along=TABLE,
           returns=("text", "image")),
    Blocks("single_transformer_blocks", "attn", "norm", None, None, total=("proj_out", "attn", "proj_mlp"), text="within",
           along=TABLE, returns=("text", "image"))),
    Packed(), clock=share, tail="norm_out", head="proj_out", cut={"img_ids": -2}, batched=False)
