from methods._core.families import Blocks, Family
from methods._core.families.clocks import share_done
from methods._core.families.grids import Listed

FAMILY = Family("z-image", ("ZImageTransformer2DModel",), (
    Blocks("layers", "attention", "attention_norm1", None, "feed_forward", text="within", text_first=False,
           along={"freqs_cis": 1, "attention_mask": 1}),),
    Listed(), "x", "t", share_done, listed=("x", "cap_feats"), cond_first=True, by_sample=False)
