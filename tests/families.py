"""One tiny pipeline of each model family, random weights, with a uniform way to run it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models import AutoencoderKLCogVideoX

from methods._zoo.pixel_vae import PixelVAE

WORDS, WIDTH = 5, 16
DIT = dict(num_attention_heads=2, attention_head_dim=16, patch_size=2, in_channels=4, out_channels=4)


def _text(batch: int, seed: int, *, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(batch, WORDS, width, generator=torch.Generator().manual_seed(100 + seed))


def _vae() -> AutoencoderKL:
    return AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32, shift_factor=0.0,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


def _livelier(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights large enough that every block matters; zero-initialised layers would hide a fault."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and float(parameter.detach().abs().max()) < 0.2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def unet(layers: int = 2) -> StableDiffusionPipeline:
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32, 64), layers_per_block=layers, cross_attention_dim=WIDTH,
        attention_head_dim=8, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2)
    return StableDiffusionPipeline(_vae(), None, None, model, _ddim(), None, None, requires_safety_checker=False)


def sdxl(layers: int = 1) -> StableDiffusionXLPipeline:
    """As on SDXL no attention at full resolution, transformers of two layers, and conditions added to the time."""
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=layers, transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       timestep_spacing="leading", steps_offset=1)
    return StableDiffusionXLPipeline(_vae(), *[None] * 4, model, scheduler, add_watermarker=False)


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)


def dit(layers: int = 3) -> DiTPipeline:
    model = DiTTransformer2DModel(**DIT, num_layers=layers, sample_size=16, num_embeds_ada_norm=1000)
    return DiTPipeline(model, PixelVAE(), DDIMScheduler(clip_sample=False))


def pixart(layers: int = 3) -> PixArtAlphaPipeline:
    model = PixArtTransformer2DModel(**DIT, num_layers=layers, sample_size=16, caption_channels=WIDTH,
                                     cross_attention_dim=32, use_additional_conditions=False)
    return PixArtAlphaPipeline(None, None, _vae(), model, DDIMScheduler(clip_sample=False))


def sd3(layers: int = 3) -> StableDiffusion3Pipeline:
    model = SD3Transformer2DModel(**DIT, num_layers=layers, sample_size=16, joint_attention_dim=WIDTH,
                                  caption_projection_dim=32, pooled_projection_dim=WIDTH, pos_embed_max_size=24)
    return StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), _vae(), *[None] * 6)


def flux(layers: int = 2) -> FluxPipeline:
    model = FluxTransformer2DModel(in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=16,
                                   num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
                                   axes_dims_rope=(4, 4, 8))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), _vae(), None, None, None, None, model)


def latte(layers: int = 2) -> LattePipeline:
    model = LatteTransformer3DModel(**DIT | {"out_channels": 8}, num_layers=layers, sample_size=16, caption_channels=WIDTH,
                                    cross_attention_dim=32, video_length=4, activation_fn="gelu-approximate",
                                    norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
                                    attention_bias=True)
    return LattePipeline(None, None, _vae(), model, DDIMScheduler(clip_sample=False))


def cogvideox(layers: int = 3) -> CogVideoXPipeline:
    model = CogVideoXTransformer3DModel(**DIT, num_layers=layers, time_embed_dim=8, text_embed_dim=WIDTH, sample_width=12,
                                        sample_height=8, sample_frames=9, temporal_compression_ratio=4,
                                        max_text_seq_length=WORDS, use_rotary_positional_embeddings=True)
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)
    return CogVideoXPipeline(None, None, vae, model, CogVideoXDDIMScheduler())


@dataclass(frozen=True)
class Family:
    """How to build one family's pipeline and run it. `sizes`: the default size in pixels, and another, not square."""

    name: str
    make: Callable[..., Any]
    sizes: tuple[tuple[int, int] | None, tuple[int, int] | None]
    image_to_image: type | None = None

    def pipe(self, **kwargs) -> Any:
        torch.manual_seed(0)
        pipe = self.make(**kwargs)
        _livelier(self.model(pipe))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @staticmethod
    def model(pipe: Any) -> torch.nn.Module:
        """The denoiser of a pipeline."""
        return pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def run(self, pipe: Any, *, seed: int = 0, steps: int = 4, size: tuple[int, int] | None = None, batch: int = 1,
            guidance: float = 3.0, **more) -> torch.Tensor:
        """Latents (or, for DiT, pixels) of one run of `pipe`."""
        common = dict(num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(seed)) | more
        dtype = self.model(pipe).dtype
        if self.name == "dit":
            labels = [(seed + i) % 10 for i in range(batch)]
            return torch.from_numpy(pipe(labels, output_type="np", **common).images)
        text, negative = (_text(batch, seed + shift).to(dtype) for shift in (0, 50))
        common |= dict(prompt_embeds=text, output_type="latent")
        if self.name == "flux":
            common |= dict(pooled_prompt_embeds=text[:, 0])
            common["guidance_scale"] = 3.5
        else:
            common |= dict(negative_prompt_embeds=negative)
        if self.name in ("sd3", "sdxl"):
            common |= dict(pooled_prompt_embeds=text[:, 0], negative_pooled_prompt_embeds=negative[:, 0])
        if self.name == "pixart":
            mask = torch.ones(batch, WORDS, dtype=torch.long)
            common |= dict(prompt_attention_mask=mask, negative_prompt_attention_mask=mask, negative_prompt=None,
                           use_resolution_binning=False)
        if self.name == "latte":
            common |= dict(negative_prompt=None, video_length=4, clean_caption=False, mask_feature=False)
        if self.name == "cogvideox":
            common |= dict(num_frames=9)
        if "image" not in more or self.name == "flux":
            height, width = size or self.sizes[0]
            common |= dict(height=height, width=width)
        out = pipe(**common)
        return out.frames if self.name in ("latte", "cogvideox") else out.images

    def second_pipe(self, pipe: Any) -> Any:
        """An image-to-image pipeline over the same components; ValueError where the library has none for the family."""
        if self.image_to_image is None:
            raise ValueError(f"{self.name} has no image-to-image pipeline")
        other = self.image_to_image.from_pipe(pipe) if self.name != "unet" else self.image_to_image(
            **pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        return other


FAMILIES = {family.name: family for family in (
    Family("unet", unet, ((32, 32), (32, 48)), StableDiffusionImg2ImgPipeline),
    Family("sdxl", sdxl, ((32, 32), (32, 48)), StableDiffusionXLImg2ImgPipeline),
    Family("dit", dit, (None, None)),
    Family("pixart", pixart, ((32, 32), (32, 48))),
    Family("sd3", sd3, ((32, 32), (32, 48)), StableDiffusion3Img2ImgPipeline),
    Family("flux", flux, ((32, 32), (32, 48)), FluxImg2ImgPipeline),
    Family("latte", latte, ((32, 32), (32, 48))),
    Family("cogvideox", cogvideox, ((64, 96), (64, 64))),
)}
