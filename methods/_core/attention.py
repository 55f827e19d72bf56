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


def qkv(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None, attention_mask: Tensor | None = None,
        **_) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, tokens, D), normed and turned, with the text of a joint attention first.

    Self-attention of one stream (a UNet, DiT, PixArt, Latte, a Flux single block) or joint attention with projections of its
    own for the text (SD3, a Flux double block) or without (CogVideoX).

    Raises:
        ValueError: keys that come from the text alone, or a mask.
    """
    if getattr(attn, "is_cross_attention", False) or attention_mask is not None:
        raise ValueError("only self-attention and joint attention without a mask can be computed here, and this one has "
                         f"{'a mask' if attention_mask is not None else 'its keys from the text'}")
    text = encoder_hidden_states
    apart = text is not None and getattr(attn, "add_q_proj", None) is not None
    x = hidden_states if text is None or apart else torch.cat([text, hidden_states], 1)
    q, k, v = (heads(project(x), attn) for project in (attn.to_q, attn.to_k, attn.to_v))
    q, k = (attn.norm_q or _same)(q), (attn.norm_k or _same)(k)
    if apart:
        words = [heads(project(text), attn) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        words[:2] = (attn.norm_added_q or _same)(words[0]), (attn.norm_added_k or _same)(words[1])
        q, k, v = (torch.cat(pair, 2) for pair in zip(words, (q, k, v), strict=True))
    if image_rotary_emb is not None:
        still = q.shape[2] - image_rotary_emb[0].shape[0]                      # text without positions
        q, k = (torch.cat([t[:, :, :still], apply_rotary_emb(t[:, :, still:], image_rotary_emb)], 2) if still else
                apply_rotary_emb(t, image_rotary_emb) for t in (q, k))
    return q, k, v


def leave(attn: nn.Module, out: Tensor, words: int) -> Tensor | tuple[Tensor, Tensor]:
    """From heads (B, H, words + N, D) to what `attn` returns: x, or (x, text) of a joint attention."""
    out = out.transpose(1, 2).flatten(2)
    if words:
        text, image = out[:, :words].contiguous(), out[:, words:].contiguous()
        if getattr(attn, "add_q_proj", None) is None:
            return project_out(attn, image), project_out(attn, text)
        return project_out(attn, image), text if getattr(attn, "context_pre_only", False) else attn.to_add_out(text)
    return out if getattr(attn, "pre_only", False) else project_out(attn, out)


def attend(attn: nn.Module, *args, **kwargs) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """What `attn` returns, and the attention mass (B, tokens) each token receives: column sums of the map, mean over heads.

    In a joint attention the mass covers text, then image.
    """
    out, mass = attention_mass(*qkv(attn, *args, **kwargs))
    text = kwargs.get("encoder_hidden_states")
    return leave(attn, out, 0 if text is None else text.shape[1]), mass


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
