"""Diff-Pruning - Structural Pruning for Diffusion Models

Gongfan Fang, Xinyin Ma, Xinchao Wang, NeurIPS 2023. arXiv:2305.10924. Code: VainF/Diff-Pruning

Idea: channels are cut out of a trained model, those first whose removal would change the loss least by a first-order Taylor
estimate. Its gradients are summed over the noise levels from the lowest on, only while the loss is worth looking at: behind
that come many steps whose gradients are small and noisy. Sampling still takes every step. What is left is tuned.

Map
    L_t, error of the noise at level t, one batch and one noise for all t      error
    sum of grad L_t until L_t < thr L_max                                      accumulate
    channels that must go together                                             Group
    score of a channel, sum of (w g)^2 over its weights                        scores
    n = C - int(C (1 - s)) channels go, equally many of each norm group        kept
    the whole                                                                  compress

Departures
    Only channels inside a block go: hidden channels of MLPs, channels of heads, and in a UNet those between the two
    convolutions of a ResNet block. The residual stream keeps its width, which in DiT the modulation of all blocks is tied to.
    The official tracer follows it through the whole network.
    Queries and keys share channels, values and the output projection share others. Fused attention divides by the square
    root of the head's width; the weights of the queries make up for its change, so that a channel of zeros goes without a
    trace.
    The loss is that of the noise whatever the model predicts. The official sums differ: squares in its code for DDPM (with
    absolute values for the affine weights of norms), here squares throughout; absolute values in that for diffusers. Biases
    are cut but not scored, as there.
    The official diffusers script compares a number of channels where it should set it, and saves whole modules by pickle.
    Here `save` writes weights, and `load` cuts the original model to their shapes.

Example
    >>> import methods
    >>> from methods import diff_pruning
    >>> pipe = methods.tiny("dit")
    >>> pipe.transformer = diff_pruning.load(pipe.transformer, methods.weights("diff_pruning"))
    >>> pipe.transformer.transformer_blocks[0].ff.net[2].in_features             # of 512
    358
    >>> images = pipe([3], num_inference_steps=2, output_type="np").images
"""
from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from methods._core.denoiser import Block, describe
from methods._core.finetuning import labelled, plain_loss
from methods._core.learning import Stage, save, train_only
from methods._core.noise import Noising, Noisy

__all__ = ["OFF", "RIVALS", "TINY", "TRAINED", "Config", "Group", "accumulate", "compress", "error", "groups", "kept", "load",
           "save", "scores", "training"]


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float = 0.3                  # s, of each group's channels
    threshold: float = 0.05             # thr: gradients are summed until the loss falls below this share of its maximum
    levels: int = 1000                  # noise levels that are looked at, evenly spaced; as many as the scheduler has: all
    criterion: str = "squares"          # of w g; or their "absolute" or "signed" sum; "magnitude" of w; "random"
    tuned: tuple[str, ...] | None = None    # parts of names of what is tuned afterwards; None: all, as in the paper
    seed: int = 0                       # of the noise

    def __post_init__(self):
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must be at least 0 and below 1")
        if not (0 <= self.threshold < 1 and self.levels >= 1):
            raise ValueError(f"threshold={self.threshold} must be at least 0 and below 1, and levels={self.levels} at least 1")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r} is none of {', '.join(CRITERIA)}")


CRITERIA = ("squares", "absolute", "signed", "magnitude", "random")
OFF = Config(ratio=0.0)
TINY = Config(levels=3)
BUNDLED = {"levels": 50, "tuned": ("attn1.", "ff.")}
TRAINED = {"diff_pruning": Config(**BUNDLED)}                                                       # on the bundled digits
RIVALS = {"diff_pruning": {"random channels": Config(criterion="random", **BUNDLED),
                           "smallest magnitude": Config(criterion="magnitude", **BUNDLED)}}


class Part(NamedTuple):
    """A weight with the channels of a group along `axis`, `copies` times one after the other."""

    module: nn.Module
    name: str
    axis: int
    copies: int = 1

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.name)


class Group(NamedTuple):
    """Channels that go together: those at equal places of all `parts`. Of each of `within` equal ranges equally many go."""

    parts: tuple[Part, ...]
    within: int = 1

    @property
    def size(self) -> int:
        return self.parts[0].weight.shape[self.parts[0].axis] // self.parts[0].copies


def rows(layer: nn.Module, copies: int = 1) -> list[Part]:
    """The channels that a layer gives."""
    return [Part(layer, name, 0, copies) for name in ("weight", "bias") if getattr(layer, name, None) is not None]


def heads(attn: nn.Module) -> list[Group]:
    columns = Part(attn.to_out[0], "weight", 1)
    return [Group((*rows(attn.to_q), *rows(attn.to_k)), attn.heads), Group((*rows(attn.to_v), columns), attn.heads)]


def _served(block: Block) -> bool:
    return (block.stream == "image" and not block.rotary and block.row.product == "one"
            and all(getattr(attn, "norm_q", None) is None and not getattr(attn, "fused_projections", False)
                    for attn in (block.attn, block.cross) if attn is not None))


def groups(model: nn.Module) -> list[Group]:
    """All groups of a model.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: blocks of another kind.
    """
    blocks = describe(model).blocks
    if not all(map(_served, blocks)):
        raise ValueError(f"diff_pruning: the attention of this {type(model).__name__} joins text and image, or turns or "
                         "normalises its queries, so the channels of a head cannot be cut apart")
    found = []
    for block in blocks:
        found += [group for attn in (block.attn, block.cross) if attn is not None for group in heads(attn)]
        if block.ff is not None:
            up, down = block.ff.net[0].proj, block.ff.net[-1]
            found.append(Group((Part(down, "weight", 1), *rows(up, up.out_features // down.in_features))))
    for layer in model.modules():
        if all(hasattr(layer, name) for name in ("conv1", "norm2", "conv2")):
            time, width = getattr(layer, "time_emb_proj", None), layer.conv2.in_channels
            found.append(Group((*rows(layer.conv1), *rows(layer.norm2), Part(layer.conv2, "weight", 1),
                                *(rows(time, time.out_features // width) if time is not None else ())), layer.norm2.num_groups))
    return found


def error(noising: Noising, output: Tensor, noisy: Noisy) -> Tensor:
    """L_t: mean squared error of the noise that an output of the model stands for."""
    a, s = noising.levels(noisy.t, noisy.x)
    x0 = noising.denoised(output[:, :noisy.x.shape[1]].float(), noisy)
    return ((noisy.x - a * x0) / s - noisy.eps).square().mean()


def accumulate(model: nn.Module, config: Config, noising: Noising, x0: Tensor, conditions: dict[str, Any]) -> list[float]:
    """Sum the gradients of L_t in the parameters, over noise levels from the lowest on, until L_t first falls below
    `config.threshold` of its maximum, and give the L_t of those levels. The noise is the same at all."""
    losses, dtype = [], next(model.parameters()).dtype
    given = {name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
             for name, value in conditions.items()}
    for u in (torch.arange(config.levels, dtype=torch.float64) + 0.5) / config.levels:
        noisy = noising.sample(x0, torch.Generator().manual_seed(config.seed), noising.process.t(u.expand(len(x0))))
        found = error(noising, model(noisy.x.to(dtype), timestep=noisy.t, return_dict=False, **given)[0], noisy)
        if losses and float(found.detach()) < config.threshold * max(losses):
            break
        found.backward()
        losses.append(float(found.detach()))
    return losses


def scores(group: Group, config: Config, random: torch.Generator) -> Tensor:
    """What the removal of each channel (C,) would cost; of the gradients that its weights have."""
    if config.criterion == "random":
        return torch.rand(group.size, generator=random)
    total = torch.zeros(group.size, dtype=torch.float64)
    for part in (part for part in group.parts if part.name == "weight"):
        weight, g = part.weight.detach().double().cpu(), part.weight.grad
        product = weight if config.criterion == "magnitude" else weight * (0 if g is None else g.double().cpu())
        product = product.movedim(part.axis, 0).flatten(1) if product.ndim > 1 else product[:, None]
        product = product.unflatten(0, (part.copies, -1)).transpose(0, 1).flatten(1)                    # (C, weights)
        total += product.sum(1) if config.criterion == "signed" else (
            product.abs() if config.criterion == "absolute" else product.square()).sum(1)
    return total.abs()                                                               # changes the signed sum only


def kept(score: Tensor, ratio: float, within: int = 1) -> Tensor:
    """Ascending indices of the channels that stay: of each of `within` ranges all but the n // within of lowest score."""
    C = len(score)
    n = (C - int(C * (1 - ratio))) // within
    ranked = score.view(within, -1).argsort(dim=1, stable=True)[:, n:]
    return (ranked + torch.arange(within)[:, None] * (C // within)).flatten().sort().values


@torch.no_grad()
def cut(group: Group, index: Tensor) -> None:
    """Leave only these channels of a group."""
    size = group.size
    for module, name, axis, copies in group.parts:
        weight, at = getattr(module, name), torch.cat([index + i * size for i in range(copies)])
        setattr(module, name, nn.Parameter(weight.index_select(axis, at.to(weight.device)), weight.requires_grad))
        for said in (("out_features", "out_channels", "num_channels") if axis == 0 else ("in_features", "in_channels")):
            if hasattr(module, said):
                setattr(module, said, len(at))


@torch.no_grad()
def fit_heads(model: nn.Module, widths: dict[nn.Module, int], *, fold: bool) -> None:
    """Tell attention of its new width, and `fold` the change of its scale into the queries."""
    for attn, was in widths.items():
        now = attn.to_q.out_features // attn.heads
        attn.inner_dim, attn.inner_kv_dim, attn.scale = attn.to_q.out_features, attn.to_k.out_features, now ** -0.5
        for part in rows(attn.to_q) if fold else ():
            part.weight.mul_(math.sqrt(now / was))


def _widths(model: nn.Module) -> dict[nn.Module, int]:
    return {attn: attn.to_q.out_features // attn.heads for block in describe(model).blocks
            for attn in (block.attn, block.cross) if attn is not None}


def compress(model: nn.Module, config: Config, noising: Noising, batches: Iterable[tuple[Tensor, dict[str, Any]]]) -> nn.Module:
    """A copy of `model` without the channels of lowest score, to be tuned; `model` stays as it is.

    Args:
        model: a UNet, DiTTransformer2DModel, PixArtTransformer2DModel or LatteTransformer3DModel.
        noising: of the pipeline's scheduler.
        batches: the first (x0, conditions) is looked at, unless the criterion needs no data.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: as `groups`; a name in `config.tuned` that no parameter has.
    """
    groups(model)
    made = copy.deepcopy(model).eval()
    if config.ratio == 0:
        return made
    made.requires_grad_(True)
    if config.criterion not in ("magnitude", "random"):
        accumulate(made, config, noising, *next(iter(batches)))
    random, widths = torch.Generator().manual_seed(config.seed), _widths(made)
    for group in groups(made):
        cut(group, kept(scores(group, config, random), config.ratio, group.within))
    made.zero_grad(set_to_none=True)
    fit_heads(made, widths, fold=True)
    train_only(made, config.tuned)
    return made


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of `model`, which was compressed, cut to the shapes of what `save` wrote and with its weights.

    Raises:
        ValueError: the file is not of this model.
    """
    state, made = load_file(path), copy.deepcopy(model).eval()
    names = {id(weight): name for name, weight in made.named_parameters()}
    if unknown := sorted(state.keys() - names.values()):
        raise ValueError(f"{Path(path).name} holds {unknown[0]} which this {type(model).__name__} lacks")
    widths = _widths(made)
    for group in groups(made):
        part = group.parts[0]
        if names[id(part.weight)] in state:
            cut(group, torch.arange(state[names[id(part.weight)]].shape[part.axis] // part.copies))
    fit_heads(made, widths, fold=False)
    for name, weight in made.named_parameters():
        weight.requires_grad_(name in state)
        if name in state and weight.shape != state[name].shape:
            raise ValueError(f"{name} in {Path(path).name} has shape {tuple(state[name].shape)}, not {tuple(weight.shape)}")
    made.load_state_dict(state, strict=False)
    return made


def training(pipe: Any, config: Config) -> Iterator[Stage]:
    """How the bundled DiT is pruned, by what it draws itself as in the official code for latent diffusion, and tuned on digits
    by its own loss, by `python tools/train_zoo.py --method diff_pruning`."""
    noising, labels = Noising(pipe.scheduler), [i % 10 for i in range(10)]
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(labels, num_inference_steps=10, generator=torch.Generator().manual_seed(config.seed), output_type="np").images
    x0 = torch.as_tensor(drawn).movedim(-1, 1) * 2 - 1
    model = compress(pipe.transformer, config, noising, [(x0, {"class_labels": torch.tensor(labels)})])
    yield labelled(pipe, model, plain_loss, steps=120, lr=5e-3)
