import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from families.making import WIDTH, Family, both, masks, vae


def make(layers: int = 2) -> ChromaPipeline:
    model = ChromaTransformer2DModel(patch_size=1, in_channels=16, num_layers=layers, num_single_layers=layers,
                                     attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
                                     axes_dims_rope=[4, 4, 8], approximator_hidden_dim=32, approximator_layers=1,
                                     approximator_num_channels=16)
    return ChromaPipeline(FlowMatchEulerDiscreteScheduler(), vae(), None, None, model)


FAMILY = Family("chroma", make, ((32, 48), (48, 32)), lambda batch, seed: dict(
    **both(batch, seed), **masks(batch, dtype=torch.bool)))
