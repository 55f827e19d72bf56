import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2Vocoder

from families.making import WIDTH, Family, both, masks


class _Connectors(torch.nn.Module):
    """Hands the embeddings on, to video and sound."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, embeds, mask, **_):
        return embeds, embeds, mask


def make(layers: int = 3) -> LTX2Pipeline:
    model = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=layers, qk_norm="rms_norm_across_heads",
        caption_channels=WIDTH,
        rope_double_precision=False, rope_type="split")
    video = AutoencoderKLLTX2Video(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), patch_size=1, patch_size_t=1,
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), downsample_type=("spatial",),
        upsample_residual=(False,), upsample_factor=(1,), timestep_conditioning=False, encoder_causal=True,
        decoder_causal=False)
    audio = AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2, resolution=32,
        latent_channels=2, norm_type="pixel", causality_axis="height", dropout=0.0, mid_block_add_attention=False,
        sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8)
    vocoder = LTX2Vocoder(in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4],
                          upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
                          leaky_relu_negative_slope=0.1, output_sampling_rate=16000)
    pipe = LTX2Pipeline(FlowMatchEulerDiscreteScheduler(), video, audio, None, None, None, model, vocoder)
    pipe.connectors = _Connectors()
    return pipe


FAMILY = Family("ltx2", make, ((32, 64), (64, 32)), lambda batch, seed: dict(
    **both(batch, seed), **masks(batch), num_frames=5, stg_scale=0.0, modality_scale=1.0, audio_guidance_scale=3.0,
    audio_stg_scale=0.0, audio_modality_scale=1.0))
