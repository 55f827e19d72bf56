"""Attention statistics that a fused attention does not show, computed with the weights of a diffusers attention module."""
from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from accel_kernels.attention_mass import attention_mass


def heads(x: Tensor, attn: nn.Module) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _same(x: Tensor) -> Tensor:
    return x


def attend(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
           image_rotary_emb: tuple[Tensor, Tensor] | None = None, **_) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """What `attn` returns, and the attention mass (B, tokens) each token receives: column sums of the map, mean over heads.

    Self-attention of one stream (DiT, PixArt, Latte, a Flux single block) or joint attention with the text first (a Flux
    double block; the mass covers text, then image).
    """
    q, k, v = (heads(project(hidden_states), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
    norm_q, norm_k = attn.norm_q or _same, attn.norm_k or _same
    q, k = norm_q(q), norm_k(k)
    words = 0
    if encoder_hidden_states is not None:
        words = encoder_hidden_states.shape[1]
        text = [heads(project(encoder_hidden_states), attn) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        q, k, v = (torch.cat(pair, 2) for pair in zip(
            [attn.norm_added_q(text[0]), attn.norm_added_k(text[1]), text[2]], (q, k, v), strict=True))
    if image_rotary_emb is not None:
        q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)
    out, mass = attention_mass(q, k, v)
    out = out.transpose(1, 2).flatten(2)
    if encoder_hidden_states is not None:
        return (project_out(attn, out[:, words:].contiguous()), attn.to_add_out(out[:, :words].contiguous())), mass
    return (out if getattr(attn, "pre_only", False) else project_out(attn, out)), mass


def project_out(attn: nn.Module, x: Tensor) -> Tensor:
    """The output projection, with its dropout."""
    for module in attn.to_out:
        x = module(x)
    return x


def cross_map(attn: nn.Module, x: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Cross-attention probabilities, mean over heads: x (B, N, C), text (B, T, C') -> (B, N, T) float32.

    `attention_mask` is the additive bias (B, 1, T) that diffusers gives to its attention modules.
    """
    q, k = heads(attn.to_q(x), attn), heads(attn.to_k(encoder_hidden_states), attn)
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if attention_mask is not None:
        scores = scores + attention_mask[:, None].float()
    return scores.softmax(-1).mean(1)
