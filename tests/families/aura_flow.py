from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from families.making import WIDTH, Family, both, masks, vae


def make(layers: int = 2) -> AuraFlowPipeline:
    model = AuraFlowTransformer2DModel(sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=layers,
                                       num_single_dit_layers=layers, attention_head_dim=8, num_attention_heads=4,
                                       caption_projection_dim=32, joint_attention_dim=WIDTH, out_channels=4,
                                       pos_embed_max_size=256)
    return AuraFlowPipeline(None, None, vae(), model, FlowMatchEulerDiscreteScheduler())


FAMILY = Family("aura-flow", make, ((32, 48), (48, 32)), lambda batch, seed: dict(**both(batch, seed), **masks(batch)))
