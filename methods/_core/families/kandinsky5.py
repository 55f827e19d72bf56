from methods._core.families import Blocks, Family
from methods._core.families.grids import Grid

FAMILY = Family("kandinsky5", ("Kandinsky5Transformer3DModel",), (
    Blocks("visual_transformer_blocks", "self_attention", "self_attention_norm", "cross_attention", "feed_forward",
           along={"rotary_emb": 1}),),
    Grid(frames=1, height=2), tail="out_layer", batched=False, by_sample=False)
