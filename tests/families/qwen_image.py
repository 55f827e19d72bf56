import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

from families.making import WIDTH, WORDS, Family, qwen_vae, text


def make(layers: int = 3) -> QwenImagePipeline:
    model = QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16,
                                        num_attention_heads=3, joint_attention_dim=WIDTH, guidance_embeds=False,
                                        axes_dims_rope=(8, 4, 4))
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), qwen_vae(), None, None, model)


def call(batch: int, seed: int) -> dict:
    """The negative prompt has another length."""
    whole, less = torch.ones(batch, WORDS, dtype=torch.long), torch.ones(batch, WORDS - 1, dtype=torch.long)
    return dict(prompt_embeds=text(batch, seed), prompt_embeds_mask=whole,
                negative_prompt_embeds=text(batch, seed + 50, words=WORDS - 1), negative_prompt_embeds_mask=less)


FAMILY = Family("qwen-image", make, ((64, 96), (64, 64)), call, guidance="true_cfg_scale")
