from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel

from families.making import WIDTH, Family, both, wan_vae


def make(layers: int = 3) -> WanVACEPipeline:
    """Blocks of control stand beside the first and the last block, and add to what these give."""
    model = WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=WIDTH,
        freq_dim=32, ffn_dim=48, num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        vace_layers=[0, layers - 1], vace_in_channels=96)
    return WanVACEPipeline(None, None, wan_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=model)


FAMILY = Family("wan-vace", make, ((64, 96), (96, 64)), lambda batch, seed: dict(**both(batch, seed), num_frames=9))
