from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

from families.making import WIDTH, Family, flux2_vae, text


def make(layers: int = 3) -> ErnieImagePipeline:
    model = ErnieImageTransformer2DModel(hidden_size=32, num_attention_heads=2, num_layers=layers, ffn_hidden_size=32,
                                         in_channels=16, out_channels=16, patch_size=1, text_in_dim=WIDTH, rope_theta=256,
                                         rope_axes_dim=(8, 4, 4), eps=1e-6, qk_layernorm=True)
    return ErnieImagePipeline(model, flux2_vae(), None, None, FlowMatchEulerDiscreteScheduler(shift=3.0))


FAMILY = Family("ernie-image", make, ((64, 96), (64, 64)), lambda batch, seed: dict(
    prompt_embeds=list(text(batch, seed)), negative_prompt_embeds=list(text(batch, seed + 50, words=4))))
