from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("ernie-image", ("ErnieImageTransformer2DModel",), (
    Blocks("layers", "self_attention", "adaLN_sa_ln", None, "mlp", text="within", text_first=False, sequence_axis=0,
           along={"image_rotary_emb": 1, "attention_mask": -1}),),
    Grid(), tail="final_norm", head="final_linear")
