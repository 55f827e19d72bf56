from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

from families.making import WIDTH, Family, both, vae


def make(layers: int = 3) -> CogView4Pipeline:
    model = CogView4Transformer2DModel(patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=16,
                                       num_attention_heads=2, out_channels=4, text_embed_dim=WIDTH, time_embed_dim=8,
                                       condition_dim=4)
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True,
                                                time_shift_type="linear")
    return CogView4Pipeline(None, None, vae(), model, scheduler)


FAMILY = Family("cogview4", make, ((32, 48), (48, 32)), both)
