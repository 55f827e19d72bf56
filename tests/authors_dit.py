"""A DiT whose weights are arithmetic, so that the authors' DiT can be given the same ones and its answers written down."""
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from methods._zoo.pixel_vae import PixelVAE


@torch.no_grad()
def pipeline(layers: int) -> DiTPipeline:
    """Layer norms and timestep frequencies as in the authors' code, from which diffusers departs in both."""
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, patch_size=2, in_channels=4, out_channels=4,
                                  num_layers=layers, sample_size=8, num_embeds_ada_norm=10)
    for n, parameter in enumerate(model.parameters()):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + n)
        parameter.copy_(0.3 * wave.view(parameter.shape))
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return DiTPipeline(model.eval().double().requires_grad_(False), PixelVAE(), DDIMScheduler(clip_sample=False))


def answers(pipe: DiTPipeline, steps: int) -> torch.Tensor:
    """One number per step and guidance half, (steps, 2), for a latent that stays the same."""
    x = torch.sin(torch.arange(512, dtype=torch.float64)).view(2, 4, 8, 8)
    pipe.scheduler.set_timesteps(steps)
    seen = []
    for t in pipe.scheduler.timesteps:
        out = pipe.transformer(x, timestep=t.expand(2), class_labels=torch.tensor([3, 10])).sample
        pipe.scheduler.step(out, t, x)
        seen.append(out[:, 1, 2, 3])
    return torch.stack(seen)
