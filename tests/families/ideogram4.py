import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
)

from families.making import WIDTH, Family, flux2_vae, text


def transformer(layers: int) -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=16, num_layers=layers, attention_head_dim=8, num_attention_heads=4, intermediate_size=32, adaln_dim=16,
        llm_features_dim=WIDTH, rope_theta=10000, mrope_section=(2, 1, 1), norm_eps=1e-5)


def encode_prompt(prompt, grid_h: int, grid_w: int, max_sequence_length: int, device) -> tuple[torch.Tensor, ...]:
    """What the pipeline makes of a prompt, by the first number in it, without its language model."""
    words, places = max_sequence_length, grid_h * grid_w
    prompts = [prompt] if isinstance(prompt, str) else prompt
    features = torch.zeros(len(prompts), words + places, WIDTH)
    features[:, :words] = torch.cat([text(1, int(each), words=words) for each in prompts])
    positions = torch.zeros(len(prompts), words + places, 3, dtype=torch.long)
    positions[:, :words] = torch.arange(words)[None, :, None]
    rows, columns = torch.meshgrid(torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
    positions[:, words:] = IMAGE_POSITION_OFFSET + torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    kinds = torch.full((len(prompts), words + places), OUTPUT_IMAGE_INDICATOR)
    kinds[:, :words] = LLM_TOKEN_INDICATOR
    return features, positions, torch.ones(len(prompts), words + places, dtype=torch.long), kinds


def make(layers: int = 3) -> Ideogram4Pipeline:
    pipe = Ideogram4Pipeline(FlowMatchEulerDiscreteScheduler(), flux2_vae(), None, None, transformer(layers),
                             transformer(layers))
    pipe.encode_prompt, pipe.check_inputs = encode_prompt, lambda **_: None
    return pipe


FAMILY = Family("ideogram4", make, ((64, 96), (64, 64)), lambda batch, seed: dict(
    prompt=[str(seed + i) for i in range(batch)], guidance_schedule=None, max_sequence_length=6))
