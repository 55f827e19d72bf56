from methods._core.families import Blocks, Family
from methods._core.families.clocks import share
from methods._core.families.grids import Grid

FAMILY = Family("aura-flow", ("AuraFlowTransformer2DModel",), (
    Blocks("joint_transformer_blocks", "attn", cross=None, ff_text="ff_context", text="apart", returns=("text", "image")),
    Blocks("single_transformer_blocks", "attn", cross=None, text="within")),
    Grid(), clock=share, embed="pos_embed", tail="norm_out", head="proj_out")
