"""Agent Attention - Agent Attention: On the Integration of Softmax and Linear Attention

Dongchen Han, Tianzhu Ye, Yizeng Han, Zhuofan Xia, Siyuan Pan, Pengfei Wan, Shiji Song, Gao Huang, ECCV 2024.
arXiv:2312.08874. Code: LeapLabTHU/Agent-Attention

Idea: a few agent tokens stand between queries and keys. The agents read all keys, then every query reads the agents: two
small softmax attentions in place of the N x N one, at a cost linear in N. For Stable Diffusion nothing is trained: the
agents are the tokens merged down almost to the destinations of ToMe, the second softmax is sharpened, and a little of the
values is added. This is done in the first 20 of 50 steps, on merged tokens; the other steps are plain token merging.

Map
    agent attention     softmax(s2 Q A^T) softmax(s1 A K^T) V + k V         accel_kernels.agent_attention
    AgentSD             tokens and agents from one matching                 _Agents
    schedule            agents in the first steps, merging in all           apply
    trained module      pooled agents, position biases, depthwise conv      AgentAttention

Departures
    Destinations are drawn as in `tome`, from `seed` and the step; the released generator runs on.
    A ratio of 0 merges nothing and still uses agents; the released code then splits the batch by mistake.
    The 20 of 50 steps with agents are a share of the run, and one patch switches after them; the released recipe patches the
    model anew inside the sampler's loop.
    A batch of odd size has random destinations too; the released code then takes the corners. Its option to form the first
    logits in single precision, for SD 2.1, is left to the fused attention, which accumulates so.
    The two products are fused attentions with scales of their own, so the N x n maps are never held.
    Self-attention over image tokens alone. Where text shares the sequence the method does not say what an agent is.
    Where positions enter inside the attention (Wan, LTX) one plan serves the batch, and tokens and agents are turned to the
    places of their destinations.
    In the trained module the grid need not be square and the class token is optional; dropout is left out.

Example
    >>> import methods
    >>> from methods import agent_attention
    >>> pipe = methods.tiny("dit")
    >>> with agent_attention.apply(pipe) as patch:
    ...     images = pipe([3], num_inference_steps=4, output_type="np").images
    >>> patch.report()["state"]
    'engaged'
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel_kernels.agent_attention import agent_attention
from accel_kernels.cosine_match import cosine_match
from methods._core.attention import unmasked
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.reduction import Reduction, reduce_all
from methods._core.tokens import Plan, joined, merge_plan, partition, reduction

__all__ = ["OFF", "AgentAttention", "Config", "apply"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.4            # r / N of the tokens, in all steps; capped at 1 - 1 / stride^2
    agent_ratio: float = 0.95     # share merged away to make the agents, under the same cap
    agent_share: float = 0.4      # share of the steps that have agents, from the first (20 of 50 in the official recipe)
    stride: int = 4               # side of a destination cell in these steps
    late_stride: int = 2          # side of a destination cell in the steps after
    sharpen: float = 0.3          # k_scale2: the second softmax is scaled by (1 / sqrt(d))^sharpen
    shortcut: float = 0.075       # k_shortcut: how much of V is added
    max_downsample: int = 1       # where the grid is at most this many times coarser than the latent
    random: bool = True           # a random destination in each cell, else its top-left corner
    seed: int = 0                 # of the random destinations

    def __post_init__(self):
        for name in ("ratio", "agent_ratio", "agent_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} outside [0, 1]")
        for name in ("stride", "late_stride", "max_downsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


OFF = Config(ratio=0.0, agent_share=0.0)


class _Agents(Reduction):
    """Merges tokens and agents from one matching of a block's input. The host fills in the cuts, and whether there are agents.

    Agents enter the attention behind the tokens and are taken apart again at its product, where they are queries alone.
    """

    def __init__(self, block: Block, config: Config):
        super().__init__(block, self.match)
        self.config = config
        self.src = self.dst = self.agents = None
        self.r = self.agent_r = 0
        self.engaged = False

    def wire(self, patch: Patch) -> None:
        super().wire(patch)
        patch.attend(self.block.attn, self.attend)

    def match(self, x: Tensor) -> Plan:
        batch, x = len(x), joined(x) if self.block.rotary else x
        score, into = cosine_match(x, self.src, self.dst)
        self.agents = merge_plan(score, into, self.src, self.dst, self.agent_r, batch) if self.engaged else None
        return merge_plan(score, into, self.src, self.dst, self.r, batch)

    def around(self, forward, *args, **kwargs):
        call = self.block.call(args, kwargs)
        plan = self.plan(call)
        if self.agents is None:
            return plan.restore(forward(**call.shorter(self.tokens, plan.owner[0], plan.reduce)))
        rows = plan.reduce(call.x)
        owner = torch.cat([plan.owner[0], self.agents.owner[0]])
        out = forward(**call.shorter(self.tokens, owner, lambda x: torch.cat([rows, self.agents.reduce(x)], 1)))
        return plan.restore(out[:, :rows.shape[1]].contiguous())

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more) -> Tensor:
        if self.agents is None:
            return product(q, k, v, attn_mask=attn_mask, **more)
        unmasked(attn_mask)
        n = self.agents.owner.shape[1]
        (q, a), (k, _), (v, _) = (x.split([x.shape[2] - n, n], 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        out = agent_attention(*(x.contiguous() for x in (q, k, v, a)), scale=scale, sharp=scale ** self.config.sharpen,
                              shortcut=self.config.shortcut)
        return torch.cat([out, torch.zeros_like(a)], 2)


class AgentAttention(nn.Module):
    """The trained module: agents are queries pooled to a square grid; both softmaxes carry position biases.

    Parameter names are those of the released classifiers, whose attention weights load as they are.

    Args:
        dim: channels C.
        num_heads: heads H; C / H channels each.
        grid: height and width of the token grid, (14, 14) for 224 px in patches of 16.
        agents: a square number of agents.
        class_token: whether a class token stands before the grid.
        qkv_bias: a bias in the projection to queries, keys and values.
    """

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], *, agents: int = 49, class_token: bool = False,
                 qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        side = round(agents ** 0.5)
        if side * side != agents:
            raise ValueError(f"agents={agents} must be a square number")
        self.num_heads, self.grid, self.side, self.extra = num_heads, grid, side, int(class_token)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        shapes = dict(an=(num_heads, agents, 7, 7), na=(num_heads, agents, 7, 7), ah=(1, num_heads, agents, grid[0], 1),
                      aw=(1, num_heads, agents, 1, grid[1]), ha=(1, num_heads, grid[0], 1, agents),
                      wa=(1, num_heads, 1, grid[1], agents))
        if class_token:
            shapes |= dict(ac=(1, num_heads, agents, 1), ca=(1, num_heads, 1, agents))
        for name, shape in shapes.items():
            self.register_parameter(f"{name}_bias", nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)))

    def biases(self) -> tuple[Tensor, Tensor]:
        """B1 (1, H, n, N) of agents over keys and B2 (1, H, N, n) of queries over agents, the class token first."""
        coarse = [F.interpolate(b, size=self.grid, mode="bilinear").flatten(2)[None] for b in (self.an_bias, self.na_bias)]
        first = coarse[0] + (self.ah_bias + self.aw_bias).flatten(3)
        second = coarse[1].mT + (self.ha_bias + self.wa_bias).flatten(2, 3)
        if self.extra:
            first, second = torch.cat([self.ac_bias, first], 3), torch.cat([self.ca_bias, second], 2)
        return first, second

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C), N = height * width, plus one for a class token -> (B, N, C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        plane = (len(x), x.shape[2], *self.grid)
        a = F.adaptive_avg_pool2d(q[:, self.extra:].mT.reshape(plane), self.side).flatten(2).mT
        dwc = self.dwc(v[:, self.extra:].mT.reshape(plane)).flatten(2).mT
        q, k, v, a = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v, a))
        first, second = (bias.to(q.dtype) for bias in self.biases())
        gathered = F.scaled_dot_product_attention(a, k, v, attn_mask=first)
        out = F.scaled_dot_product_attention(q, a, gathered, attn_mask=second).transpose(1, 2).flatten(2)
        return self.proj(out + F.pad(dwc, (0, 0, self.extra, 0)))


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Attend through agents in the first steps and merge tokens in all, in every self-attention over image tokens.

    Args:
        target: a diffusers pipeline.

    Raises:
        ValueError: a bare model (the share needs the number of steps), no self-attention over image tokens alone at that
            downsampling, or already applied.
    """
    patch = Patch(target, "agent_attention")
    if config.ratio == 0 and config.agent_share == 0:
        return patch
    blocks = patch.blocks_at(config.max_downsample, lambda b: b.stream == "image" and not b.masked,
                             " over image tokens alone, without a mask")
    patch.require_pipeline()

    def prepare(context: StepContext) -> Callable:
        early = context.i < round(config.agent_share * context.steps, 9)
        stride = config.stride if early else config.late_stride
        random = context.random(config.seed) if config.random else None

        def ready(layer: _Agents, grid: tuple[int, int, int]) -> int:
            layer.src, layer.dst = partition(grid, stride, random, context.sample.device)
            N = len(layer.src) + len(layer.dst)
            layer.r, layer.agent_r = (reduction(N, len(layer.dst), ratio) for ratio in (config.ratio, config.agent_ratio))
            layer.engaged = early and 2 * (N - layer.agent_r) < N - layer.r
            patch.counts["agents" if layer.engaged else "merged"] += 1
            return layer.agent_r if layer.engaged else layer.r
        return ready

    return reduce_all(patch, [_Agents(block, config) for block in blocks], prepare)
