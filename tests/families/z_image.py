import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from families.making import WIDTH, Family, text, vae


def make(layers: int = 3) -> ZImagePipeline:
    model = ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=layers,
                                     n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True,
                                     cap_feat_dim=WIDTH, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4],
                                     axes_lens=[256, 32, 32])
    with torch.no_grad():
        model.x_pad_token.fill_(1.0)
        model.cap_pad_token.fill_(1.0)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), vae(), None, None, model)


FAMILY = Family("z-image", make, ((32, 48), (64, 32)), lambda batch, seed: dict(
    prompt_embeds=list(text(batch, seed)), negative_prompt_embeds=list(text(batch, seed + 50, words=40))))
