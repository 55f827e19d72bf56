"""SJD - Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding

Yao Teng, Han Shi, Xian Liu, Xuefei Ning, Guohao Dai, Yu Wang, Zhenguo Li, Xihui Liu, ICLR 2025. arXiv:2410.01699.
Code: tyshiwo1/Accelerating-T2I-AR-with-SJD

Idea: one pass over a window of draft tokens gives the law p of every next token. Drafts are accepted in order by the
speculative-sampling rule; the first that fails is resampled from what p has over q. Behind it, fresh samples from p become
the drafts of the next pass, with q = p: a Jacobi iteration of random samples. The tokens have the law of ordinary sampling.

Map
    s (cond - uncond) + uncond                            guide
    the law p of a token: image ids, row ends, top-k      distribution
    accept a draft with probability min(1, p/q)           acceptance
    resample from max(0, p - q), normalised               residual
    one window: first rejection, resampled or bonus       verify
    fresh samples become drafts                           slide
    token initialisation: random or left neighbour        initial

Departures
    The prompt ends where the image begins (behind any size markers), the prompt's pass gives one token, and the window
    shrinks at the end of the image; the released scripts name a range of positions for each model instead.
    A new draft at the end of a row is the end-of-line token, which the official code leaves to chance. Within a row the
    left neighbour may itself be new: then it is copied on.
    Rows of a batch advance separately. The official code advances all by the least, keeps the surplus accepted tokens as
    drafts under the q they were accepted with, and so is exact for one row only.
    Not repeated from the official code: it passes the residual through temperature and top-k again (temperature would
    count twice); where rows have no end token its column count for the horizontal initialisations is one too high; those
    initialisations read past the scores it keeps; it draws new drafts from the global generator.
    At temperature 0 a draft stands if it is the most likely token: the deterministic Jacobi decoding that SJD extends.

Example
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from methods import sjd
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=40)).eval()
    >>> decoded = sjd.generate(model, torch.tensor([[3, 5]]), sjd.Config(tokens=24, window=8))
    >>> tuple(decoded.tokens.shape), decoded.report["forwards"] <= 24
    ((1, 24), True)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from methods._core.ar import ImageLM, Prefix, describe

__all__ = ["OFF", "TINY", "Config", "Decoded", "acceptance", "distribution", "generate", "guide", "initial", "residual",
           "slide", "verify"]


@dataclass(frozen=True, kw_only=True)
class Config:
    window: int = 16                               # W, tokens per pass, of which W-1 are drafts
    init: str = "random"                           # new drafts: "random", "repeat" or "sample" (from the left neighbour)
    guidance: float = 3.0                          # s, of Lumina-mGPT; 1: no unconditional half
    top_k: int | None = 2000                       # K for image tokens, of Lumina-mGPT; None: all
    temperature: float = 1.0                       # of the softmax; 0: greedy
    tokens: int = 1024                             # N, tokens to generate, row ends included
    columns: int | None = None                     # image tokens in a row; None: the grid is not known
    end_of_line: int | None = None                 # id forced after each row; None: rows are not marked
    image_tokens: tuple[int, ...] | None = None    # ids that may stand in a row; None: those the model names
    seed: int = 0                                  # of every draw

    def __post_init__(self):
        for name in ("window", "tokens", "top_k", "columns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.init not in ("random", "repeat", "sample"):
            raise ValueError(f"init={self.init!r} must be 'random', 'repeat' or 'sample'")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance={self.guidance} must be a number of at least 0")
        if self.columns is None and self.init != "random":
            raise ValueError(f"init={self.init!r} copies within a row: set columns, which is None")
        if self.columns is None and self.end_of_line is not None:
            raise ValueError(f"end_of_line={self.end_of_line} stands behind a row: set columns, which is None")
        if self.image_tokens is not None and not self.image_tokens:
            raise ValueError("image_tokens=() must name at least one id")

    @property
    def row(self) -> int | None:
        """Tokens from the start of one row to that of the next; None where the grid is not known."""
        return None if self.columns is None else self.columns + (self.end_of_line is not None)

    def ends_row(self, positions: Tensor) -> Tensor:
        """Where the end-of-line token stands, for `positions` counted from the first generated token."""
        if self.end_of_line is None:
            return torch.zeros_like(positions, dtype=torch.bool)
        return positions % self.row == self.columns


OFF = Config(window=1)
TINY = Config(window=7, tokens=40)


class Decoded(NamedTuple):
    """`tokens` (B, N) without the prompt.

    `report`: `forwards` (passes through the model, the prompt's included), `tokens` (N), `compression` (tokens per pass),
    `advances` (B, forwards): how many tokens each pass gave to each row, 0 once the row has ended.
    """

    tokens: Tensor
    report: dict[str, Any]


def guide(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on logits."""
    return guidance * (cond - uncond) + uncond


def distribution(logits: Tensor, positions: Tensor, allowed: Tensor, config: Config) -> Tensor:
    """The law of the next token at each position, after everything that shapes it.

    Args:
        logits: (B, W, V), guided.
        positions: (B, W), counted from the first generated token.
        allowed: (V,) bool, the ids that may stand in a row.

    Returns:
        (B, W, V) probabilities, in float32 or better.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~allowed, -torch.inf)
    if config.temperature == 0:
        p = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    else:
        if config.top_k is not None:
            least = logits.topk(min(config.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = (logits / config.temperature).softmax(-1)
    if config.end_of_line is not None:
        end = F.one_hot(torch.full_like(positions, config.end_of_line), p.shape[-1]).to(p)
        p = torch.where(config.ends_row(positions)[..., None], end, p)
    return p


def acceptance(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    """min(1, p(d) / q(d)) for `drafts` (...) and laws (..., V)."""
    d = drafts[..., None]
    return (p.gather(-1, d) / q.gather(-1, d)).clamp(max=1).squeeze(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What p has over q, normalised, for laws (..., V). Where it has nothing a rejection is a rounding error: p itself."""
    over = (p - q).clamp(min=0)
    total = over.sum(-1, keepdim=True)
    return torch.where(total > 0, over / total, p)


def verify(p: Tensor, q: Tensor, drafts: Tensor, fresh: Tensor, coins: Tensor, generator: torch.Generator
           ) -> tuple[Tensor, Tensor]:
    """Accept drafts up to the first rejection.

    Args:
        p: (B, W, V), row j the law of the token that draft j stands for; the last row is behind all drafts.
        q: (B, W-1, V), the laws that the drafts were drawn from.
        drafts: (B, W-1).
        fresh: (B, W), samples from p; the last one follows when every draft stands.
        coins: (B, W-1), uniform on [0, 1).

    Returns:
        Tokens (B, W) and how many of them are final (B,), from 1 to W.
    """
    width = fresh.shape[1]
    accepted = (coins < acceptance(p[:, :-1], q, drafts)).long().cumprod(-1).sum(-1)
    tokens = torch.cat([drafts, fresh[:, -1:]], dim=1)
    rows = (accepted < width - 1).nonzero().squeeze(-1)
    if len(rows):
        at = accepted[rows]
        tokens[rows, at] = _draw(residual(p[rows, at], q[rows, at]), generator)
    return tokens, accepted + 1


def initial(random: Tensor, left: Tensor, positions: Tensor, config: Config) -> Tensor:
    """New drafts at `positions` (B, C): random ones, or in each row the token `left` (B,) of them; row ends are known."""
    tokens = random.clone()
    if config.init != "random":
        for k in range(tokens.shape[1]):
            left = torch.where(positions[:, k] % config.row == 0, random[:, k], left)
            tokens[:, k] = left
    return tokens if config.end_of_line is None else tokens.masked_fill(config.ends_row(positions), config.end_of_line)


def slide(fresh: Tensor, p: Tensor, new: Tensor, final: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The next `count` drafts behind the `final` (B,) tokens: samples `fresh` (B, W) of this pass, whose law is p, then
    `new` (B, C) tokens, which are certain. Returns drafts (B, count) and their laws (B, count, V)."""
    tokens = torch.cat([fresh, new], dim=1)
    laws = torch.cat([p, F.one_hot(new, p.shape[-1]).to(p)], dim=1)
    at = final[:, None] + torch.arange(count, device=final.device)
    return tokens.gather(1, at), laws.gather(1, at[..., None].expand(-1, -1, p.shape[-1]))


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


def _image_tokens(lm: ImageLM, prompt: Tensor, config: Config) -> Tensor:
    """The ids that may stand in a row; refuses what would fail later with less to say."""
    if lm.model.training:
        raise ValueError("the model is in training mode: its dropout would change p between passes; call model.eval()")
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}; it must be (B, P) token ids with P of at least 1")
    ids = lm.image_tokens if config.image_tokens is None else config.image_tokens
    for name, values in (("image_tokens", ids), ("end_of_line", () if config.end_of_line is None else (config.end_of_line,))):
        if wrong := [i for i in values if not 0 <= i < lm.vocab_size]:
            raise ValueError(f"{name} names id {wrong[0]}, outside of the vocabulary 0..{lm.vocab_size - 1}")
    return torch.tensor(ids, device=prompt.device)


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: Tensor, config: Config = Config()) -> Decoded:
    """Continue each prompt by `config.tokens` image tokens.

    Args:
        model: an autoregressive image model with a row in methods/_core/ar.py, in eval mode.
        prompt: (B, P) token ids, up to where the image begins. Guidance hides all but the last from the other half.

    Raises:
        TypeError: the model has no row.
        ValueError: the model is in training mode, the prompt is no batch of ids, an id is outside of the vocabulary.
    """
    lm = describe(model)
    image_tokens = _image_tokens(lm, prompt, config)
    allowed = torch.zeros(lm.vocab_size, dtype=torch.bool, device=prompt.device)
    allowed[image_tokens] = True
    generator = torch.Generator(prompt.device).manual_seed(config.seed)
    batch, N = len(prompt), config.tokens
    prefix = Prefix(lm, prompt, config.guidance != 1, prompt.shape[1] + N - 1)
    out, n = prompt.new_zeros(batch, N), prompt.new_zeros(batch)                   # n: tokens each row has so far
    inputs, drafts, q = prompt, prompt[:, :0], torch.empty(batch, 0, lm.vocab_size, device=prompt.device)
    advances = []
    while True:
        width = drafts.shape[1] + 1
        positions = n[:, None] + torch.arange(width, device=n.device)
        logits = prefix.logits(inputs, width)
        p = distribution(guide(*logits, config.guidance) if len(logits) == 2 else logits[0], positions, allowed, config)
        fresh = _draw(p, generator)
        coins = torch.rand(drafts.shape, dtype=p.dtype, device=p.device, generator=generator)
        tokens, final = verify(p, q, drafts, fresh, coins, generator)
        final = final.minimum(N - n)
        prefix.keep(final, of=width)
        rows, columns = (torch.arange(width, device=n.device) < final[:, None]).nonzero(as_tuple=True)
        out[rows, positions[rows, columns]] = tokens[rows, columns]
        advances.append(final)
        n = n + final
        if (n == N).all():
            break
        count = min(config.window, int((N - n).max())) - 1
        new = max(0, int(final.max()) + count - width)
        ahead = positions[:, -1:] + 1 + torch.arange(new, device=n.device)
        left = p[:, -1].argmax(-1) if config.init == "sample" else fresh[:, -1]
        random = image_tokens[torch.randint(len(image_tokens), ahead.shape, device=n.device, generator=generator)]
        drafts, q = slide(fresh, p, initial(random, left, ahead, config), final, count)
        inputs = torch.cat([out.gather(1, n[:, None] - 1), drafts], dim=1)
    report = {"forwards": len(advances), "tokens": N, "compression": N / len(advances),
              "advances": torch.stack(advances, dim=1)}
    return Decoded(out, report)
