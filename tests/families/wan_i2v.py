import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel

from families.making import WIDTH, Family, both, wan_vae


def make(layers: int = 3) -> WanImageToVideoPipeline:
    """From a first frame, whose latent and mask are channels behind the noise."""
    model = WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36,
                                  out_channels=16, text_dim=WIDTH, freq_dim=32, ffn_dim=48, num_layers=layers,
                                  cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32)
    return WanImageToVideoPipeline(None, None, wan_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=model)


def call(batch: int, seed: int) -> dict:
    frame = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
    return dict(**both(batch, seed), image=frame, num_frames=9)


FAMILY = Family("wan-i2v", make, ((64, 96), (96, 64)), call, row="wan")
