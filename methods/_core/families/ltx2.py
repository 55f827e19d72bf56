from methods._core.families import Blocks, Family
from methods._core.families.grids import Named

FAMILY = Family("ltx2", ("LTX2VideoTransformer3DModel",), (
    Blocks("transformer_blocks", more=("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn", "audio_ff"),
           along={"query_rotary_emb": -2, "attention_mask": (-2, -1)}, returns=("image", "text"),
           second="audio_hidden_states"),),
    Named(), tail="norm_out", head="proj_out", latents=2)
