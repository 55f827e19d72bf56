import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel

from families.making import WIDTH, Family, text, vae


def make(layers: int = 2) -> HiDreamImagePipeline:
    model = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=layers, num_single_layers=layers, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[WIDTH, WIDTH], text_emb_dim=WIDTH, num_routed_experts=2,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32),
        llama_layers=tuple(i % 2 for i in range(2 * layers)), force_inference_output=True)
    pipe = HiDreamImagePipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae(), *[None] * 8, model)
    pipe.default_sample_size = 8
    return pipe


def call(batch: int, seed: int) -> dict:
    def layers(shift: int) -> torch.Tensor:
        return torch.stack([text(batch, seed + shift + i, words=4) for i in range(2)])

    return dict(prompt_embeds_t5=text(batch, seed), negative_prompt_embeds_t5=text(batch, seed + 50),
                prompt_embeds_llama3=layers(0), negative_prompt_embeds_llama3=layers(50),
                pooled_prompt_embeds=text(batch, seed)[:, 0], negative_pooled_prompt_embeds=text(batch, seed + 50)[:, 0])


FAMILY = Family("hidream", make, ((32, 32), (32, 32)), call)
