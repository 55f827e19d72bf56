from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from families.making import WIDTH, Family, both, masks, vae


def make(layers: int = 3) -> Lumina2Pipeline:
    model = Lumina2Transformer2DModel(sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=layers,
                                      num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
                                      ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=[8, 4, 4],
                                      axes_lens=(300, 64, 64), cap_feat_dim=WIDTH)
    return Lumina2Pipeline(model, FlowMatchEulerDiscreteScheduler(), vae(), None, None)


def call(batch: int, seed: int) -> dict:
    """The negative prompt is shorter."""
    found = both(batch, seed) | masks(batch)
    found["negative_prompt_attention_mask"][:, -1] = 0
    return found


FAMILY = Family("lumina2", make, ((32, 48), (48, 32)), call)
