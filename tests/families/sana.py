from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

from families.making import WIDTH, Family, both, masks


def make(layers: int = 3) -> SanaPipeline:
    model = SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=layers, num_attention_heads=2,
                                   attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
                                   cross_attention_dim=16, caption_channels=WIDTH, sample_size=32)
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407)
    return SanaPipeline(None, None, vae, model, FlowMatchEulerDiscreteScheduler(shift=3.0))


FAMILY = Family("sana", make, ((32, 64), (64, 32)), lambda batch, seed: dict(
    **both(batch, seed), **masks(batch), prompt=None, negative_prompt=None, use_resolution_binning=False,
    complex_human_instruction=None))
