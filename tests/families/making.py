"""How a tiny pipeline is made and run, and the parts that several share."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
)

WORDS, WIDTH = 5, 16
DIT = dict(num_attention_heads=2, attention_head_dim=16, patch_size=2, in_channels=4, out_channels=4)
DENOISERS = ("unet", "transformer", "prior")


def text(batch: int, seed: int, *, words: int = WORDS, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(batch, words, width, generator=torch.Generator().manual_seed(100 + seed))


def both(batch: int, seed: int, **more: Any) -> dict[str, torch.Tensor]:
    """The embeddings of prompts and negative prompts."""
    return {"prompt_embeds": text(batch, seed, **more), "negative_prompt_embeds": text(batch, seed + 50, **more)}


def masks(batch: int, name: str = "prompt_attention_mask", words: int = WORDS,
          dtype: torch.dtype = torch.long) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, words, dtype=dtype)
    return {name: mask, f"negative_{name}": mask}


def picture(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32,
                         shift_factor=0.0, down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2)


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True])


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
                                  latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=1,
                              layers_per_block=1, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 4),
                              latent_channels=4, use_quant_conv=False, use_post_quant_conv=False)


def ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)


def livelier(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights large enough that every block matters; zero-initialised layers would hide a fault."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and float(parameter.detach().abs().max()) < 0.2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Family:
    """How to build one family's pipeline and run it.

    `sizes`: the default size in pixels, and another, not square, where there is one. `call(batch, seed)`: what else the
    pipeline is called with; `guidance` names the argument of the scale. `row` is the name of the family in
    `methods/_core/families`, where it is another one.
    """

    name: str
    make: Callable[..., Any]
    sizes: tuple[tuple[int, int] | None, tuple[int, int] | None]
    call: Callable[[int, int], dict[str, Any]]
    guidance: str | None = "guidance_scale"
    scale: float | None = None
    image_to_image: type | None = None
    row: str = ""

    def __str__(self) -> str:
        return self.name

    def pipe(self, **kwargs) -> Any:
        torch.manual_seed(0)
        pipe = self.make(**kwargs)
        for model in self.models(pipe):
            livelier(model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @staticmethod
    def models(pipe: Any) -> list[torch.nn.Module]:
        names = (*DENOISERS, "transformer_2", "unconditional_transformer")
        return [model for name in names if (model := getattr(pipe, name, None)) is not None]

    @classmethod
    def model(cls, pipe: Any) -> torch.nn.Module:
        """The denoiser of a pipeline, the first where it has several."""
        return cls.models(pipe)[0]

    def run(self, pipe: Any, *, seed: int = 0, steps: int = 4, size: tuple[int, int] | None = None, batch: int = 1,
            guidance: float = 3.0, twins: bool = False, **more) -> torch.Tensor:
        """Latents (or, for DiT, pixels) of one run of `pipe`; of `twins` all samples have the same noise."""
        random = [torch.Generator().manual_seed(seed) for _ in range(batch if twins else 1)]
        dtype = self.model(pipe).dtype
        arguments = {name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
                     for name, value in self.call(batch, seed).items()}
        arguments = {"num_inference_steps": steps, "generator": random if twins else random[0], "output_type": "latent",
                     **arguments}
        if self.guidance is not None:
            arguments[self.guidance] = guidance if self.scale is None else self.scale
        if self.sizes[0] is not None and ("image" not in more or self.name == "flux"):
            arguments |= dict(zip(("height", "width"), size or self.sizes[0], strict=True))
        out = pipe(**arguments | more)
        found = out[0] if isinstance(out, tuple) else next(iter(out.values()))
        return torch.as_tensor(found)

    def second_pipe(self, pipe: Any) -> Any:
        """An image-to-image pipeline over the same components; ValueError where the library has none for the family."""
        if self.image_to_image is None:
            raise ValueError(f"{self.name} has no image-to-image pipeline")
        other = self.image_to_image.from_pipe(pipe) if self.name != "unet" else self.image_to_image(
            **pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        return other
