import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

from families.making import WIDTH, Family, masks, qwen_vae, text


def make(layers: int = 3) -> Krea2Pipeline:
    model = Krea2Transformer2DModel(
        in_channels=16, num_layers=layers, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=WIDTH, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2), rope_theta=1000.0)
    return Krea2Pipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), qwen_vae(), None, None, model,
                         text_encoder_select_layers=(0, 1, 2))


def call(batch: int, seed: int) -> dict:
    def layers(shift: int) -> torch.Tensor:
        return torch.stack([text(batch, seed + shift + i) for i in range(3)], 2)

    return dict(prompt_embeds=layers(0), negative_prompt_embeds=layers(50),
                **masks(batch, "prompt_embeds_mask", dtype=torch.bool))


FAMILY = Family("krea2", make, ((64, 96), (64, 64)), call)
