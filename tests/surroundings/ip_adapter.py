import torch
from families import FAMILIES, WIDTH

from surroundings import Situation

EMBED, TOKENS = 8, 4


def weights(unet: torch.nn.Module) -> dict:
    """Random weights for the cross-attentions of a UNet, named as the released ones."""
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * 0.5

    pairs = {}
    for i, attn in enumerate(module for name, module in unet.named_modules() if name.endswith("attn2")):
        pairs |= {f"{2 * i + 1}.to_k_ip.weight": draw(attn.to_k.out_features, WIDTH),
                  f"{2 * i + 1}.to_v_ip.weight": draw(attn.to_v.out_features, WIDTH)}
    return {"image_proj": {"proj.weight": draw(TOKENS * WIDTH, EMBED), "proj.bias": draw(TOKENS * WIDTH),
                           "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}, "ip_adapter": pairs}


def make():
    pipe = FAMILIES["unet"].pipe()
    pipe.unet._load_ip_adapter_weights([weights(pipe.unet)])
    pipe.set_ip_adapter_scale(1.0)
    return pipe


def image(seed: int) -> torch.Tensor:
    seen = torch.randn(1, 1, EMBED, generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.zeros_like(seen), seen])


SITUATION = Situation("IP-Adapter", "unet", make, lambda pipe, moved, **more: FAMILIES["unet"].run(
    pipe, steps=6, **more, ip_adapter_image_embeds=[image(moved)]))
