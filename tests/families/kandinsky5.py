import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel

from families.making import WIDTH, WORDS, Family, text, vae


def make(layers: int = 3) -> Kandinsky5T2IPipeline:
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=64, num_text_blocks=1, num_visual_blocks=layers, axes_dims=(2, 2, 4), visual_cond=False,
        attention_type="regular")
    pipe = Kandinsky5T2IPipeline(model, vae(), None, None, None, None, FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.resolutions = [(64, 96), (96, 64)]
    return pipe


def call(batch: int, seed: int) -> dict:
    ends = torch.arange(batch + 1, dtype=torch.int32) * WORDS
    return dict(prompt=None, prompt_embeds_qwen=text(batch, seed), prompt_embeds_clip=text(batch, seed, words=1)[:, 0],
                negative_prompt_embeds_qwen=text(batch, seed + 50), prompt_cu_seqlens=ends, negative_prompt_cu_seqlens=ends,
                negative_prompt_embeds_clip=text(batch, seed + 50, words=1)[:, 0])


FAMILY = Family("kandinsky5", make, ((64, 96), (96, 64)), call)
