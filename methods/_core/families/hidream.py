from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

ALONG = {"image_rotary_emb": 1, "hidden_states_masks": 1}

FAMILY = Family("hidream", ("HiDreamImageTransformer2DModel",), (
    Blocks("double_stream_blocks.*.block", "attn1", "norm1_i", None, "ff_i", "ff_t", text="apart", text_first=False,
           along=ALONG, returns=("image", "text")),
    Blocks("single_stream_blocks.*.block", "attn1", "norm1_i", None, "ff_i", text="within", text_first=False, along=ALONG)),
    Grid(), time="timesteps", by_sample=False, tail="final_layer")
