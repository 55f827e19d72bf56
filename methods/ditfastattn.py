"""DiTFastAttn - DiTFastAttn: Attention Compression for Diffusion Transformer Models

Zhihang Yuan et al., NeurIPS 2024. arXiv:2406.08552. Code: thu-nics/DiTFastAttn

Idea: self-attention repeats itself in space, in time and across guidance. A plan says of each step and block whether it runs
in full, in a band along the tokens to which the part outside the band of an earlier step is added, for the conditional
half alone, or not at all. The plan is searched once for a model: the strongest method whose error is small enough.

Map
    WA-RS          W_k + R_r, R_r = O_r - W_r of the last full step r      _Layer.attend
    W              attention to the tokens at most w away                  methods._core.attention.banded
    when R         at a full step, if WA-RS comes before the next one      needs_residual
    AST            output of the module, as the last step gave it          methods._core.cache.Reuse
    ASC            the conditional half, for both branches of guidance     _Layer.halved
    theta_i        delta * (i + 1) / L for block i of L                    thresholds
    L(O, O')       mean of |O - O'| / max(O, O'), at most 10 an element    loss
    search         greedy over steps, then blocks, then methods            calibrate, methods._core.search.greedy

Departures
    No plan of the authors is released. Without one, every four steps run in full, shared, windowed, shared in all blocks: a
    choice made here, not a searched one. A plan for another number of steps is read in proportion.
    The window is a share of the tokens, 1/8 on each side as the authors set it for DiT and PixArt at their resolutions.
    WA-RS with ASC adds the conditional half of the residual. The released code adds the first half of the batch, which is the
    unconditional one in PixArt's pipelines. Its processor stops at a breakpoint, which is left out; it counts steps by calls of
    the attention, here the scheduler does.
    Bands are cut into pieces of w queries, which see 3 w keys under a mask. Where text is in the sequence, all image queries
    see it, and its queries see everything. The released code knows self-attention over image tokens only.
    `calibrate` judges by the relative error alone, not by SSIM or LPIPS.

Example
    >>> import methods
    >>> from methods import ditfastattn
    >>> pipe = methods.tiny("dit")
    >>> with ditfastattn.apply(pipe) as patch:
    ...     images = pipe([3], num_inference_steps=4, output_type="np").images
    >>> [patch.report()[word] for word in ("full", "share", "window")]
    [6, 12, 6]
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods._core.attention import band_share, banded, unmasked
from methods._core.cache import Reuse
from methods._core.context import StepContext
from methods._core.denoiser import Block
from methods._core.patch import Patch, per_denoiser
from methods._core.search import Candidate, Journal, greedy
from methods._core.site import Claim

__all__ = ["METHODS", "OFF", "Config", "Plan", "apply", "calibrate", "loss", "needs_residual", "thresholds"]

METHODS = ("full", "share", "window+guidance", "window", "guidance")     # behind "full", in the order in which they are tried
CYCLE = ("full", "share", "window", "share")                             # without a plan

Plan = Sequence[str | Sequence[str]]                # step -> a method for each block, or one for all


@dataclass(frozen=True, kw_only=True)
class Config:
    plan: Plan | str | Path | None = None           # or the file that `calibrate` wrote; None: CYCLE, over and over
    window: float = 1 / 8                           # w, the tokens on each side, as a share of all

    def __post_init__(self):
        plan = json.loads(Path(self.plan).read_text()) if isinstance(self.plan, (str, Path)) else self.plan
        if plan is not None:
            rows = tuple((row,) if isinstance(row, str) else tuple(row) for row in plan)
            object.__setattr__(self, "plan", rows)
            if not rows or set(rows[0]) != {"full"}:
                raise ValueError("the first step of a plan must be 'full' in all blocks")
            if unknown := {word for row in rows for word in row} - set(METHODS):
                raise ValueError(f"plan: {min(unknown)!r} must be one of {', '.join(METHODS)}")
        if not 0 < self.window <= 1:
            raise ValueError(f"window={self.window} outside (0, 1]")


OFF = Config(plan=["full"])


def needs_residual(column: Sequence[str], i: int) -> bool:
    """Whether one block, whose methods are `column`, must keep a residual if it runs in full at step `i`."""
    for word in column[i + 1:]:
        if word in ("full", "guidance"):
            return False
        if word.startswith("window"):
            return True
    return False


def thresholds(delta: float, blocks: int) -> list[float]:
    """theta_i = delta * (i + 1) / L: what the output of the model may err once block i is decided."""
    return [delta * (i + 1) / blocks for i in range(blocks)]


def loss(full: Tensor, other: Tensor) -> float:
    """L(O, O'), with the signed maximum of the released code in the denominator."""
    full, other = full.float(), other.float()
    return float(((full - other) / (torch.maximum(full, other) + 1e-6)).abs().clip(0, 10).mean())


class _Layer:
    """The self-attention of one block. The host calls `set` before each call of the denoiser."""

    def __init__(self, patch: Patch, block: Block, window: float):
        self.block, self.share = block, window
        self.reuse, self.residual = Reuse(patch.slot), patch.slot()
        self.tokens = self.window = 0
        self.windowed = self.keep = False
        self.half: int | None = None                # which half of the batch runs for both
        patch.around(block.attn, self.around)
        patch.attend(block.attn, self.attend)

    def set(self, word: str, context: StepContext, keep: bool) -> str:
        """-> the method that will run: in full where nothing is kept, for the whole batch where guidance has no two halves."""
        if (word == "share" and not self.reuse.ready) or (word.startswith("window") and self.residual.value is None):
            word = "full"
        if word.endswith("guidance") and sorted(context.rows.parts) != ["cond", "null"]:
            word = "full" if word == "guidance" else "window"
        self.tokens = math.prod(context.grid(self.block))
        self.window = max(1, round(self.share * self.tokens))
        self.reuse.reuse = word == "share"
        self.half = context.rows.parts.index("cond") if word.endswith("guidance") else None
        self.windowed = word.startswith("window")
        self.keep = keep and word in ("full", "guidance")
        return word

    @property
    def cost(self) -> float:
        """Of the attention as it is set, in plain attention products."""
        band = band_share(self.tokens, self.window)
        cost = band if self.windowed else 1 + band * self.keep
        return 0.0 if self.reuse.reuse else cost if self.half is None else cost / 2

    def around(self, forward, *args, **kwargs):
        return self.reuse.around(partial(self.halved, forward), *args, **kwargs)

    def halved(self, forward, *args, **kwargs):
        if self.half is None:
            return forward(*args, **kwargs)
        rows = len(args[0] if args else kwargs["hidden_states"])

        def cut(x):
            return self.cut(x) if torch.is_tensor(x) and x.ndim > 2 and len(x) == rows else x

        out = forward(*map(cut, args), **{name: cut(x) for name, x in kwargs.items()})
        return tuple(torch.cat([x, x]) for x in out) if isinstance(out, tuple) else torch.cat([out, out])

    def cut(self, x: Tensor) -> Tensor:
        return x.narrow(0, self.half * (len(x) // 2), len(x) // 2)

    def attend(self, product, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more) -> Tensor:
        out = None if self.windowed else product(q, k, v, attn_mask=attn_mask, **more)
        if not (self.windowed or self.keep):
            return out
        unmasked(attn_mask)
        (image, words), (k_image, k_words), (v_image, v_words) = (self.block.parted(x, self.tokens) for x in (q, k, v))
        near = banded(product, image, k_image, v_image, self.window, k_words, v_words, **more)
        if self.windowed:
            residual = self.residual.get()
            near = near + (residual if self.half is None else self.cut(residual))
            return self.block.joined(near, product(words, k, v, **more)) if words.shape[2] else near
        residual = self.block.parted(out, self.tokens)[0] - near
        self.residual.keep(residual if self.half is None else torch.cat([residual, residual]))
        return out


def _layers(patch: Patch, window: float) -> list[_Layer]:
    patch.require_pipeline()
    blocks = patch.require((block for block in patch.denoiser.blocks if not block.masked), "self-attention without a mask")
    return [_Layer(patch, block, window) for block in blocks]


def calibrate(pipe: Any, run: Callable[[], Any], *, delta: float = 0.05, config: Config = Config(),
              journal: Path | None = None, save: Path | None = None, tell: Callable[[str], None] | None = None) -> Plan:
    """Search: the plan of a model for its number of steps, from one run in which every step tries the methods block by block.

    Args:
        pipe: a diffusers pipeline that carries no other patch.
        run: calls the pipeline, always in the same way, with as many prompts as shall be judged together.
        delta: error that the last block may reach (0.05 for DiT, 0.0725 for PixArt-Sigma).
        config: its window is used.
        journal: a file that takes every judged candidate down, of one model, run and window; a search that was stopped goes on
            from it, and one with another `delta` uses what it has.
        save: a JSON file for the plan, which `Config(plan=...)` reads.
        tell: called with a line of progress for each candidate.

    Raises:
        ValueError: no self-attention, a bare model, or a model with another patch.
    """
    patch = Patch(pipe, "ditfastattn")
    layers = _layers(patch, config.window)
    slots = [slot for layer in layers for slot in (*layer.reuse.slots, layer.residual)]
    genes: Candidate = ()
    now: dict[str, Any] = {}

    def attempt(candidate: Candidate, keep: bool = False) -> Any:
        """The model's output under the last methods of a candidate. What its attentions kept before is still kept then."""
        before = [slot.value for slot in slots]
        for layer, gene in zip(layers, candidate[-len(layers):], strict=True):
            layer.set(METHODS[gene], now["context"], keep)
        out = now["model"]()
        for slot, value in zip(slots, () if keep else before, strict=not keep):
            slot.value = value
        return out

    @lru_cache(maxsize=1)
    def in_full(earlier: Candidate) -> Tensor:
        return attempt((*earlier, *[0] * len(layers)))[0]

    def judge(candidate: Candidate) -> tuple[float]:
        return (loss(in_full(candidate[:-len(layers)]), attempt(candidate)[0]),)

    def search(forward: Callable, *args, **kwargs) -> Any:
        nonlocal genes
        context, now["model"] = now["context"], partial(forward, *args, **kwargs)
        if context.call == 0:
            genes = (*(genes if context.i else ()), *[0] * len(layers))
            places = range(len(genes) - len(layers), len(genes)) if context.i else ()
            options = [n for n, word in enumerate(METHODS) if n and (context.guided or not word.endswith("guidance"))]
            genes = greedy(work, genes, options, dict(zip(places, thresholds(delta, len(layers)), strict=False)))
        return attempt(genes, keep=True)

    work = Journal(judge, journal, tell)
    patch.around(patch.model, search, Claim.WHOLE)
    patch.each_call(lambda context: now.update(context=context))
    with patch.on():
        run()
    words = [METHODS[gene] for gene in genes]
    plan = [words[n:n + len(layers)] for n in range(0, len(words), len(layers))]
    if save is not None:
        save.write_text(json.dumps(plan) + "\n")
    return plan


@per_denoiser
def apply(target: Any, config: Config = Config()) -> Patch:
    """Compress the self-attention of every block by the plan.

    Blocks that compile have a graph for each method, and for "full" and "guidance" with a residual and without: with more than
    four of the seven, torch._dynamo.config.recompile_limit must be above its default of 8.

    Args:
        target: a diffusers pipeline.

    Raises:
        ValueError: no self-attention, a plan for another number of blocks, a bare model (the plan goes by the steps of a run),
            or already applied. While it runs: an attention with a mask has no band.
    """
    patch = Patch(target, "ditfastattn")
    if config.plan and set().union(*config.plan) == {"full"}:
        return patch
    layers = _layers(patch, config.window)
    plan = config.plan and [row * len(layers) if len(row) == 1 else row for row in config.plan]
    for row in plan or ():
        if len(row) != len(layers):
            raise ValueError(f"ditfastattn: the plan has {len(row)} blocks, this {type(patch.model).__name__} {len(layers)}")

    def decide(context: StepContext) -> None:
        steps = range(context.steps)
        for n, layer in enumerate(layers):
            column = [plan[i * len(plan) // len(steps)][n] if plan else CYCLE[i % len(CYCLE)] for i in steps]
            word = layer.set(column[context.i], context, needs_residual(column, context.i))
            patch.skips([layer.block.attn] if word == "share" else ())
            patch.counts[word] += 1
            patch.tally(1 - layer.cost, 1)

    patch.each_call(decide)
    patch.explain(lambda: "the plan compresses no step of this run")
    return patch.on()
