from methods._core.families import Blocks, Family
from methods._core.families.clocks import share
from methods._core.families.grids import Packed

ALONG = {"image_rotary_emb": 0, "attention_mask": (-2, -1)}

FAMILY = Family("chroma", ("ChromaTransformer2DModel",), (
    Blocks("transformer_blocks", "attn", cross=None, ff_text="ff_context", text="apart", along=ALONG,
           returns=("text", "image")),
    Blocks("single_transformer_blocks", "attn", "norm", None, None, total=("proj_out", "attn", "proj_mlp"), text="within",
           along=ALONG)),
    Packed(), clock=share, tail="norm_out", head="proj_out", batched=False)
