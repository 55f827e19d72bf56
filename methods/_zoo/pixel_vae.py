"""The autoencoder of a pixel-space model: none. It lets pipelines that insist on a VAE run without one."""
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, ones


class PixelVAE(ModelMixin, ConfigMixin):
    """Latents are the pixels, (B, C, H, W) in [-1, 1]; encoding and decoding change nothing."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0):
        super().__init__()
        self.register_buffer("unit", ones(()))         # says which device and dtype the model is on

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        return DecoderOutput(sample=z * self.unit) if return_dict else (z * self.unit,)
