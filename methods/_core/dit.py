"""What class-conditional diffusion transformers share (DiT, Peebles and Xie 2023): the embedded noise level, blocks that it
modulates, the layer that leaves them, fixed positions, labels left out and guidance."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from methods._core.ancestral import ancestral, spaced
from methods._core.parts import Block, zeroed

FREQUENCIES = 256                                  # of the embedding of a noise level


class Level(nn.Module):
    """Noise levels (B,), as the model is told them -> (B, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        dtype = torch.promote_types(self.mlp[0].weight.dtype, torch.float32)
        steps = torch.arange(FREQUENCIES // 2, dtype=dtype, device=t.device)
        angles = t[:, None].to(dtype) * (-math.log(10000) * steps / len(steps)).exp()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, C) times 1 + scale plus shift, each (B, C)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Head(nn.Module):
    """LayerNorm, modulated by a condition (B, cond), and a linear map of tokens (B, N, width) to (B, N, out); all of it
    starts at zero."""

    def __init__(self, width: int, cond: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(cond, 2 * width)))
        self.linear = zeroed(nn.Linear(width, out))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.linear(modulated(self.norm(x), *self.modulation(cond).chunk(2, dim=-1)))


def blocks(count: int, width: int, heads: int, cond: int) -> nn.ModuleList:
    """The chain of a DiT: adaLN-Zero blocks whose MLP has the tanh form of GELU."""
    made = nn.ModuleList(Block(width, heads, cond) for _ in range(count))
    for block in made:
        block.mlp[1] = nn.GELU(approximate="tanh")
    return made


def chain_macs(count: int, tokens: int, width: int, cond: int) -> int:
    """Multiply-accumulates of such a chain for one image: 12 N D^2 + 2 N^2 D a block, and 6 C D for its condition."""
    return count * (12 * tokens * width ** 2 + 2 * tokens ** 2 * width + 6 * cond * width)


def positions(width: int, side: int) -> Tensor:
    """(side^2, width): sines and cosines of the column and the row of each place, a quarter of the width, whole, to each."""
    return get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float()


def hidden(labels: Tensor, none: int, share: float, random: torch.Generator) -> Tensor:
    """`labels` (B,), each replaced by `none` with probability `share`."""
    drawn = torch.rand(len(labels), generator=random, device=random.device).to(labels.device)
    return labels.masked_fill(drawn < share, none)


def checked(labels: Tensor, classes: int) -> None:
    """Raises ValueError for labels that are not in 0..classes, of which the last stands for none."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(f"labels must lie in 0..{classes}, {classes} for none; these reach from {labels.min()} to "
                         f"{labels.max()}")


def ddpm() -> DDPMScheduler:
    """The noise levels that DiT trains with: 1000 of them, linear, of which it says the noise and a variance."""
    return DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="epsilon", variance_type="learned_range",
                         clip_sample=False)


@torch.no_grad()
def sampled(model: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, labels: Tensor, none: int, steps: int,
            guidance: Callable[[int], float], random: torch.Generator, clip: float = 0.0) -> Tensor:
    """From noise x (B, C, H, W) to samples by the levels of `ddpm`.

    Args:
        model: x, times (B,) and labels (B,) -> noise and variance (B, 2C, H, W).
        none: the label of no class.
        guidance: of a time the weight of what the label changes; where it is 1 there is no second row without a label.
        clip: the largest value that is seen in the noise, of pixels; 0: none, as for latents.
    """
    kept = (1 - ddpm().betas.double()).cumprod(0).tolist()

    def says(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        weight, C = guidance(t), x.shape[1]
        times = torch.full((len(x),), t, device=x.device)
        if weight == 1:
            noise, variance = model(x, times, labels).split(C, dim=1)
        else:
            both = torch.cat([labels, torch.full_like(labels, none)])
            cond, uncond = model(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
            noise, variance = uncond[:, :C] + weight * (cond - uncond)[:, :C], cond[:, C:]
        x0 = (x - (1 - kept[t]) ** 0.5 * noise) / kept[t] ** 0.5
        return x0.clamp(-clip, clip) if clip else x0, variance

    return ancestral(says, x, kept, spaced(len(kept), steps), random)
