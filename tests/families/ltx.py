from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

from families.making import WIDTH, Family, both, masks


def make(layers: int = 3) -> LTXPipeline:
    model = LTXVideoTransformer3DModel(in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4,
                                       attention_head_dim=8, cross_attention_dim=32, num_layers=layers, caption_channels=WIDTH)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1, patch_size_t=1,
        encoder_causal=True, decoder_causal=False)
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, model)


FAMILY = Family("ltx", make, ((32, 64), (64, 32)), lambda batch, seed: dict(**both(batch, seed), **masks(batch), num_frames=9))
