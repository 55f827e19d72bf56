from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel

from families.making import WIDTH, Family, text, vae


def make(layers: int = 2) -> FluxPipeline:
    model = FluxTransformer2DModel(in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=16,
                                   num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
                                   axes_dims_rope=(4, 4, 8))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(), None, None, None, None, model)


def call(batch: int, seed: int) -> dict:
    words = text(batch, seed)
    return dict(prompt_embeds=words, pooled_prompt_embeds=words[:, 0])


FAMILY = Family("flux", make, ((32, 32), (32, 48)), call, scale=3.5, image_to_image=FluxImg2ImgPipeline)
