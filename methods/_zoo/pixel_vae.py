"""The autoencoder of a pixel-space model: none. It lets pipelines that insist on a VAE run without one."""
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, ones


class PixelVAE(ModelMixin, ConfigMixin):
    """Latents are the pixels, (B, C, ..., H, W) in [-1, 1]; decoding changes nothing. Pipelines ask for the settings."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0, shift_factor: float = 0.0, block_out_channels: tuple[int, ...] = (1,),
                 latent_channels: int = 3, temporal_compression_ratio: int = 1):
        super().__init__()
        self.register_buffer("unit", ones(()))         # says which device and dtype the model is on

    def decode(self, z: Tensor, return_dict: bool = True, **ignored: Any) -> DecoderOutput | tuple[Tensor]:
        return DecoderOutput(sample=z * self.unit) if return_dict else (z * self.unit,)
