"""DiffCR - Layer- and Timestep-Adaptive Differentiable Token Compression Ratios for Efficient Diffusion Transformers

Haoran You, Connelly Barnes, Yuqian Zhou, Yan Kang, Zhenbang Du, Wei Zhou, Lingzhi Zhang, Yotam Nitzan, Xiaoyang Liu, Zhe Lin,
Eli Shechtman, Sohrab Amirghodsi, Yingyan Celine Lin, CVPR 2025. arXiv:2412.16822. Code: GATECH-EIC/DiffCR

Idea: in each block a router scores the tokens; the best of them take the block, attending to each other alone, and the others
pass it by. How many, is learnt: one share for each block and each range of timesteps. A block runs at the two round shares
beside its own and the outputs are mixed, so that the loss has a gradient in the share. Only the mean of all shares is tied to
a target. Afterwards each share is rounded, and a block runs once.

Map
    w = sigmoid(x W_r)                                                     Routed
    k = ceil(rho N) tokens with the largest w, in their order              kept
    MLP of a kept token, times its w                                       Weighted
    y = alpha y_1 + (1 - alpha) y_2, alpha = (b_2 - rho) / (b_2 - b_1)     mixed
    one rho for each block and each of R ranges of timesteps               Shares
    L = L_diffusion + 0.3 (mean rho - target)^2                            loss

Departures
    The release is pseudo-code. There the router's weight scales the MLP, as here; in the words of the paper it scales what a
    kept token gets. Its bins end at 0.3 while the share may fall to 0.1, and below 0.3 the mix extrapolates: here the bins go
    on to 0.1. Bins are whole tenths, so that rounding never keeps a token too many.
    There a share that starts at 1 stands at the end of a clamp, where its gradient is 0, and stays. Here the clamp lets
    gradients pass.
    Routers have a bias, at which they start near 1, so that the pretrained model is not changed at once.
    A batch of training comes from one range of timesteps, so that all of its samples keep equally many tokens, and the
    penalty is on the mean of all shares, not of those of the batch.
    The shares of a call of several ranges are the largest of theirs.

Example
    >>> import methods
    >>> from methods import diffratio_mod
    >>> pipe = methods.tiny("dit")
    >>> pipe.transformer = diffratio_mod.convert(pipe.transformer, diffratio_mod.TRAINED["diffratio_mod"])
    >>> diffratio_mod.load(pipe.transformer, methods.weights("diffratio_mod"))
    >>> images = pipe([3], num_inference_steps=2, output_type="np").images
    >>> bool(abs(diffratio_mod.rounded(pipe.transformer).mean() - 0.7) < 0.03)
    True
"""
from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.around import Around, before_calls, image_blocks, swap
from methods._core.denoiser import check_whole, describe
from methods._core.finetuning import check_trainable, labelled
from methods._core.learning import Stage, load, save, train_only
from methods._core.noise import Noising, stratified

__all__ = ["OFF", "RIVALS", "TINY", "TRAINED", "Config", "Routed", "Shares", "Weighted", "convert", "costs", "kept", "load",
           "loss", "mixed", "rounded", "save", "training"]


@dataclass(frozen=True, kw_only=True)
class Config:
    target: float = 0.8                 # mean share of tokens that are kept; 1: nothing is routed
    regions: int = 4                    # R, equal ranges of timesteps, each with its own shares
    weight: float = 0.3                 # of the penalty
    start: float = 1.0                  # the shares before training
    learnt: bool = True                 # whether they train; else all stay at `start`, a uniform mixture of depths
    bias: float = 4.0                   # of the routers before training, at which w is 0.98
    tuned: tuple[str, ...] | None = None    # parts of names of what else trains; None: all, as for inpainting in the paper
    seed: int = 0                       # of the routers' weights

    def __post_init__(self):
        for name in ("target", "start"):
            if not LEAST <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {LEAST} and at most 1")
        if not (self.regions >= 1 and self.weight >= 0):
            raise ValueError(f"regions={self.regions} must be at least 1 and weight={self.weight} at least 0")


LEAST, BINS, STEPS = 0.1, 10, 1000          # the smallest share, bins of a tenth, timesteps of the clock
OFF = Config(target=1.0)
TINY = Config(target=0.5, regions=2, start=0.74, tuned=("ff.inner",))
BUNDLED = {"target": 0.7, "weight": 4.0, "tuned": ("attn1.to_out", "net.2")}
TRAINED = {"diffratio_mod": Config(**BUNDLED)}                                                      # on the bundled digits
RIVALS = {"diffratio_mod": {"uniform share": Config(**BUNDLED, start=0.7, learnt=False)}}


def costs(k: int, D: int) -> int:
    """Multiply-accumulates of self-attention and MLP of a block for k kept tokens of D channels."""
    return 12 * k * D ** 2 + 2 * k ** 2 * D


def kept(w: Tensor, tenths: int) -> Tensor:
    """Ascending places (B, k) of the k = ceil(N `tenths` / 10) tokens with the largest of w (B, N)."""
    k = min(w.shape[1], -(-tenths * w.shape[1] // BINS))
    return w.topk(k, dim=1).indices.sort(dim=1).values


def mixed(rho: Tensor, run: Any) -> Tensor:
    """The outputs `run(tenths)` at the two bins beside the share `rho` (), mixed so that their mean share is rho."""
    low = min(math.floor(round(float(rho.detach()) * BINS, 4)), BINS - 1)
    alpha = low + 1 - rho.float() * BINS
    first, second = run(low), run(low + 1)
    return (alpha * first + (1 - alpha) * second).to(second.dtype)


class Weighted(Around):
    """An MLP whose outputs (B, k, D) are multiplied by the weights (B, k) of their tokens."""

    w: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.inner(x, *args, **kwargs)
        return out if self.w is None else out * self.w[..., None].to(out)


class Routed(Around):
    """A block that only the tokens with the largest w take; the others keep their values."""

    rho: Tensor | int | None = None                        # the share of this call: to be mixed, or in tenths; None: all

    def __init__(self, inner: nn.Module, like: nn.Linear, config: Config, random: torch.Generator):
        super().__init__(inner)
        self.router = nn.utils.skip_init(nn.Linear, like.in_features, 1)
        nn.init.normal_(self.router.weight, std=like.in_features ** -0.5, generator=random)
        nn.init.constant_(self.router.bias, config.bias)
        self.router.to(like.weight.device, like.weight.dtype)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, ff = hidden_states, self.inner.ff
        if self.rho is None:
            return self.inner(x, *args, **kwargs)
        w = self.router(x)[..., 0].sigmoid()

        def run(tenths: int) -> Tensor:
            at = kept(w, tenths)
            rows = at[..., None].expand(-1, -1, x.shape[2])
            ff.w = w.gather(1, at)
            y = self.inner(x.gather(1, rows), *args, **kwargs)
            ff.w = None
            return x.scatter(1, rows, y.to(x.dtype))

        return run(self.rho) if isinstance(self.rho, int) else mixed(self.rho, run)


class Shares(nn.Module):
    """The share of each of L blocks in each of R ranges of timesteps, `model.shares` of a converted model."""

    def __init__(self, blocks: int, config: Config):
        super().__init__()
        self.config = config
        self.shares = nn.Parameter(torch.full((blocks, config.regions), config.start))
        self.mixing = False                                # while `loss` runs

    def rho(self) -> Tensor:
        """(L, R) within [0.1, 1], with the gradient of what they are made of."""
        return self.shares + (self.shares.clamp(LEAST, 1) - self.shares).detach()

    def decide(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Before a call of the model: how many tokens each block keeps."""
        check_whole(describe(model).blocks)
        t = torch.as_tensor(inputs["timestep"]).flatten()
        regions = (t * self.config.regions // STEPS).long().clamp(0, self.config.regions - 1).unique()
        found = self.rho()[:, regions.to(self.shares.device)].amax(1)
        for block, rho in zip(describe(model).blocks, found, strict=True):
            block.module.rho = rho if self.mixing else round(float(rho.detach()) * BINS)

    @contextmanager
    def mix(self, model: nn.Module) -> Iterator[None]:
        """Within, blocks run at two shares and their outputs are mixed."""
        self.mixing = True
        try:
            yield
        finally:
            self.mixing = False
            for block in describe(model).blocks:           # shares with a gradient, which could not be copied
                block.module.rho = block.ff.w = None


def _shares(model: nn.Module) -> Shares:
    if not isinstance(getattr(model, "shares", None), Shares):
        raise ValueError(f"this {type(model).__name__} has no shares: convert it first, with a target below 1")
    return model.shares


def rounded(model: nn.Module) -> Tensor:
    """The shares (L, R) by which a converted model samples. Raises ValueError where it is not converted."""
    return (_shares(model).rho().detach().float() * BINS).round() / BINS


def convert(model: nn.Module, config: Config = Config()) -> nn.Module:
    """A copy of `model` with routers and shares; put it in the place of the pipeline's transformer.

    Args:
        model: a DiTTransformer2DModel or PixArtTransformer2DModel. It stays as it is.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: already converted; blocks of another kind; a name in `config.tuned` that no parameter has.
    """
    if hasattr(model, "shares"):
        raise ValueError(f"this {type(model).__name__} has shares already")
    image_blocks(model, "diffratio_mod")
    model = copy.deepcopy(model).eval()
    if config.target == 1:
        return model
    blocks, random = describe(model).blocks, torch.Generator().manual_seed(config.seed)
    for block in blocks:
        block.module.ff = Weighted(block.ff)
    swap(model, {block.module: Routed(block.module, block.attn.to_q, config, random) for block in blocks})
    model.shares = Shares(len(blocks), config).to(model.device, model.dtype)
    before_calls(model, model.shares.decide)
    train_only(model, None if config.tuned is None else ("shares.", "router.", *config.tuned))
    model.shares.shares.requires_grad_(config.learnt)
    return model


def loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator, **conditions: Any
         ) -> dict[str, Tensor]:
    """The training loss of a converted model as `loss`, and for show the mean `share` and the `spread` of the shares.

    Args:
        noising: of the pipeline's scheduler.
        x0: (B, C, H, W), clean latents.
        step: of the training, not needed here.
        random: of timesteps, which are those of one range, and noise.
        conditions: further inputs of the model, such as `class_labels`.

    Raises:
        ValueError: not converted, in training mode, or with gradient checkpointing.
    """
    shares = _shares(model)
    check_trainable(model)
    config = shares.config
    u = (torch.randint(config.regions, (), generator=random) + stratified(len(x0), random)) / config.regions
    noisy = noising.sample(x0, random, noising.process.t(u))
    with shares.mix(model):
        found = noising.loss(model(noisy.x, timestep=noisy.t, return_dict=False, **conditions)[0], noisy)
    rho = shares.rho().float()
    return {"loss": found + config.weight * (rho.mean() - config.target) ** 2, "share": rho.mean(),
            "spread": rho.std(correction=0)}


def training(pipe: Any, config: Config) -> Iterator[Stage]:
    """How the bundled DiT is trained on digits, by `python tools/train_zoo.py --method diffratio_mod`."""
    yield labelled(pipe, convert(pipe.transformer, config), loss, steps=120, lr=5e-3, rates={"shares.": 40.0})
