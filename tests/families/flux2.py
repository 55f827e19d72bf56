from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

from families.making import WIDTH, Family, flux2_vae, text


def transformer(layers: int = 2, **more) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=layers, num_single_layers=layers,
                                   attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
                                   timestep_guidance_channels=32, axes_dims_rope=[4] * 4, **more)


def make(layers: int = 2) -> Flux2Pipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2Pipeline(scheduler, flux2_vae(), None, None, transformer(layers))


FAMILY = Family("flux2", make, ((32, 48), (48, 64)), lambda batch, seed: dict(prompt_embeds=text(batch, seed)))
