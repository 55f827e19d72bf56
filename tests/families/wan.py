from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from families.making import WIDTH, Family, both, wan_vae


def transformer(layers: int = 3) -> WanTransformer3DModel:
    return WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
                                 out_channels=16, text_dim=WIDTH, freq_dim=32, ffn_dim=48, num_layers=layers,
                                 cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32)


def make(layers: int = 3) -> WanPipeline:
    return WanPipeline(None, None, wan_vae(), FlowMatchEulerDiscreteScheduler(shift=7.0), transformer(layers))


FAMILY = Family("wan", make, ((64, 96), (96, 64)), lambda batch, seed: dict(**both(batch, seed), num_frames=9))
