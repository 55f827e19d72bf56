"""ACM - Adaptive Computation Modules: Granular Conditional Computation for Efficient Inference

Bartosz Wójcik, Alessio Devoto, Karol Pustelnik, Pasquale Minervini, Simone Scardapane, AAAI 2025. arXiv:2312.10193.
Code: bartwojcik/adaptive_computation_modules

Idea: each MLP of a trained transformer is replaced by N small ones, learners, that are added up in a fixed order. A gate reads
each token and says how many of them it gets, so that the width varies from token to token while no token ever leaves. First
the learners copy the MLP, whatever their number; then the gates learn where one more no longer helps; then all train
together, with terms that hold the mean number to a budget and keep the gates from saying the same of every token.

Map
    h(z, k), the sum of the first k learners                        Acm
    phase I: mean over k of (h(z, k) - o)^2                         distillation
    phase II: the smallest n with d(n) / d(n - 1) >= tau            labels
    L_b = | sum_l mean k_l p_l / sum_l N p_l - beta |               budget_loss
    L_e, entropy of the choices within a sample                     entropy_loss
    L_d, difference of the means of two samples                     diversity_loss
    phase III: the task, .1 L_b + .05 L_e + .05 L_d                 loss

Departures
    The paper is on classification and speech; that this is a diffusion transformer, whose task is the denoising loss, is our
    transfer. Only MLPs are replaced, as in its speech models; in its image models also the projections of attention.
    Learners start as slices of the MLP's hidden channels, those with the largest weights first, in place of random ones.
    In the released code tokens that choose the largest number in a batch get one learner fewer, gates get no gradient from
    the task, and a label is lost where the first learner is no help; none is repeated. Its gates have no activation between
    their layers; here they have one.
    The difference of samples is maximised as in the code; as printed it would be minimised.

Example
    >>> import methods
    >>> from methods import acm
    >>> pipe = methods.tiny("dit")
    >>> pipe.transformer = acm.convert(pipe.transformer, acm.TRAINED["acm"])
    >>> acm.load(pipe.transformer, methods.weights("acm"))
    >>> images = pipe([3, 1, 4], num_inference_steps=10, output_type="np").images
    >>> acm.chosen(pipe.transformer).shape                              # of the last step: samples, blocks, tokens
    torch.Size([6, 6, 256])
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods._core.around import image_blocks
from methods._core.denoiser import describe
from methods._core.finetuning import check_trainable, labelled
from methods._core.learning import Stage, load, save, train_only
from methods._core.noise import Noising
from methods._core.width import twin

__all__ = ["OFF", "RIVALS", "TINY", "TRAINED", "Acm", "Config", "budget_loss", "chosen", "convert", "distillation",
           "diversity_loss", "entropy_loss", "labels", "load", "loss", "save", "training"]


@dataclass(frozen=True, kw_only=True)
class Config:
    learners: int = 4                   # N, of each MLP; 1 and a budget of 1: the model as it is
    budget: float = 0.5                 # beta, mean share of the learners that run
    fixed: int | None = None            # as many learners for each token, without gates
    temperature: float = 0.8            # of the Gumbel draws of the gates in training
    hidden: int = 16                    # width of a gate
    helps: float = 1 / 1.2              # tau: a learner that leaves this share of the error is no help
    weights: tuple[float, float, float] = (0.1, 0.05, 0.05)     # of budget, entropy and diversity
    tuned: tuple[str, ...] | None = None    # parts of names of what trains in phase III; None: all, as in the paper
    seed: int = 0                       # of the gates' weights

    def __post_init__(self):
        if not (self.learners >= 1 and 0 < self.budget <= 1 and self.temperature > 0 and self.hidden >= 1):
            raise ValueError(f"learners={self.learners} and hidden={self.hidden} must be at least 1, budget={self.budget} and "
                             f"temperature={self.temperature} above 0, and the budget at most 1")
        if self.fixed is not None and not 1 <= self.fixed <= self.learners:
            raise ValueError(f"fixed={self.fixed} must be at least 1 and at most learners={self.learners}")
        if len(self.weights) != 3 or not min(self.weights) >= 0:
            raise ValueError(f"weights={self.weights} must be three numbers of at least 0")


OFF = Config(learners=1, budget=1.0)
TINY = Config(tuned=("ff.",))
TRAINED = {"acm": Config(tuned=("ff.",), weights=(1.0, 0.05, 0.05))}                                # on the bundled digits
RIVALS = {"acm": {"two learners for each token": Config(tuned=("ff.",), fixed=2)}}


def hard(logits: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    """One-hot choices (..., K) of Gumbel draws, with the gradient of their softmax."""
    u = torch.rand(logits.shape, generator=random, device=random.device).to(logits).clamp(1e-7, 1 - 1e-7)
    soft = ((logits - (-u.log()).log()) / temperature).softmax(-1)
    return F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft) + (soft - soft.detach())


class Acm(nn.Module):
    """N learners in the place of an MLP, and the gate that says how many of them a token gets."""

    def __init__(self, ff: nn.Module, config: Config, random: torch.Generator):
        super().__init__()
        up, down, N = ff.net[0].proj, ff.net[-1], config.learners
        order = (up.weight.norm(dim=1) * down.weight.norm(dim=0)).argsort(descending=True, stable=True)
        self.up, self.down, self.config = copy.deepcopy(up), copy.deepcopy(down), config
        self.up.weight.data, self.down.weight.data = up.weight.data[order], down.weight.data[:, order]
        self.up.bias.data, self.down.bias = up.bias.data[order], None       # so that no learners give 0
        self.activation = twin(ff.net[0], proj=nn.Identity())
        layers = [nn.utils.skip_init(nn.Linear, *size) for size in (
            (up.in_features, config.hidden), (config.hidden, config.hidden), (config.hidden, N + 1))]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight, generator=random)
            nn.init.zeros_(layer.bias)
        self.gate = None if config.fixed else nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2]).to(
            up.weight.device, up.weight.dtype)
        self.random: torch.Generator | None = None          # of the choices while `loss` runs
        self.said: Tensor | None = None                     # of the last call: (B, T), or one-hot with a gradient (B, T, N + 1)

    def all(self, z: Tensor) -> Tensor:
        """h(z, k) for k = 0 to N, (..., N + 1, D)."""
        hidden = self.activation(self.up(z)).unflatten(-1, (self.config.learners, -1))
        each = torch.einsum("...nb,dnb->...nd", hidden, self.down.weight.unflatten(1, (self.config.learners, -1)))
        return F.pad(each.cumsum(-2), (0, 0, 1, 0))

    def prefix(self, z: Tensor, k: Tensor) -> Tensor:
        """h(z, k) for tokens z (T, D) with their k (T,); a token costs its own learners alone."""
        order = k.argsort(descending=True, stable=True)
        rows, out = z[order], torch.zeros_like(z)
        for n, count in enumerate((k[:, None] > torch.arange(self.config.learners, device=k.device)).sum(0).tolist()):
            out[:count] += self.some(rows[:count], n, n + 1).to(out)
        return out[order.argsort()]

    def some(self, z: Tensor, first: int, end: int) -> Tensor:
        """The sum of the learners from the `first` on, before the `end`."""
        b = self.up.out_features // self.config.learners
        part = slice(first * b, end * b)
        return F.linear(self.activation(F.linear(z, self.up.weight[part], self.up.bias[part])), self.down.weight[:, part])

    def forward(self, z: Tensor) -> Tensor:
        if self.gate is None:
            return self.some(z, 0, self.config.fixed)
        logits = self.gate(z)
        if self.random is None:
            self.said = logits.argmax(-1)
            return self.prefix(z.flatten(0, -2), self.said.flatten()).view_as(z)
        self.said = hard(logits.float(), self.config.temperature, self.random)
        runs = self.said.flip(-1).cumsum(-1).flip(-1)[..., 1:]                  # of each learner, whether k reaches it
        hidden = self.activation(self.up(z))
        return self.down(hidden * runs.repeat_interleave(hidden.shape[-1] // runs.shape[-1], -1).to(hidden))


def _acms(model: nn.Module) -> list[Acm]:
    found = [block.ff for block in describe(model).blocks if isinstance(block.ff, Acm)]
    if not found:
        raise ValueError(f"this {type(model).__name__} has no learners: convert it first")
    return found


@contextmanager
def drawn(modules: list[Acm], random: torch.Generator) -> Iterator[None]:
    """Within, choices are drawn and have a gradient."""
    for module in modules:
        module.random = random
    try:
        yield
    finally:
        for module in modules:                              # choices with a gradient, which could not be copied
            module.random = module.said = None


def convert(model: nn.Module, config: Config = Config()) -> nn.Module:
    """A copy of `model` with learners and gates in place of its MLPs; put it in the place of the pipeline's transformer.

    Args:
        model: a DiTTransformer2DModel or PixArtTransformer2DModel. It stays as it is.

    Raises:
        TypeError: no row in methods/_core/families.
        ValueError: already converted; blocks of another kind; `learners` that do not divide the hidden channels; a name in
            `config.tuned` that no parameter has.
    """
    if any(isinstance(block.ff, Acm) for block in describe(model).blocks):
        raise ValueError(f"this {type(model).__name__} has learners already")
    if not all(block.ff.net[0].proj.out_features == block.ff.net[-1].in_features for block in image_blocks(model, "acm")):
        raise ValueError(f"acm: the MLPs of this {type(model).__name__} are gated")
    model = copy.deepcopy(model).eval()
    if config == OFF:
        return model
    random = torch.Generator().manual_seed(config.seed)
    for block in describe(model).blocks:
        if block.ff.net[-1].in_features % config.learners:
            raise ValueError(f"learners={config.learners} must divide the {block.ff.net[-1].in_features} hidden channels")
        block.module.ff = Acm(block.ff, config, random)
    train_only(model, config.tuned)
    return model


def chosen(model: nn.Module) -> Tensor:
    """How many learners each token got in the last call of a converted model, (B, L, T). Raises ValueError where none chose."""
    said = [module.said for module in _acms(model)]
    if any(each is None for each in said):
        raise ValueError("no gate has been called yet")
    return torch.stack(said, 1)


def seen(model: nn.Module, call: Callable[[nn.Module], Any]) -> list[tuple[Tensor, Tensor]]:
    """What each MLP of a plain model is given and gives in a call, (B, T, D) both; without gradients."""
    found: list[tuple[Tensor, Tensor]] = []
    hooks = [block.ff.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
             for block in describe(model).blocks]
    try:
        with torch.no_grad():
            call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def distillation(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Phase I: the mean squared error of h(z, k) over tokens, channels and all k, summed over the modules."""
    return sum(F.mse_loss(module.all(z), o[..., None, :].expand(*o.shape[:-1], module.config.learners + 1, -1).to(z))
               for module, (z, o) in zip(_acms(model), pairs, strict=True))


def labels(d: Tensor, helps: float) -> Tensor:
    """Phase II: of errors d(0), ..., d(N) (..., N + 1) the smallest n from 2 on with d(n) / d(n - 1) >= helps, else N."""
    enough = d[..., 2:] / d[..., 1:-1].clamp(min=1e-12) >= helps
    return torch.where(enough.any(-1), enough.to(torch.uint8).argmax(-1) + 2, d.shape[-1] - 1)


def imitation(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Phase II: the cross-entropy of the gates against `labels`, the mean over the modules."""
    def error(module: Acm, z: Tensor, o: Tensor) -> Tensor:
        d = (module.all(z).detach() - o[..., None, :]).float().norm(dim=-1)
        return F.cross_entropy(module.gate(z).float().flatten(0, -2), labels(d, module.config.helps).flatten())
    return sum(error(module, *pair) for module, pair in zip(_acms(model), pairs, strict=True)) / len(pairs)


def budget_loss(said: Tensor, budget: float) -> Tensor:
    """L_b of choices (L, B, T, N + 1) of modules of equal costs."""
    N = said.shape[-1] - 1
    return ((said * torch.arange(N + 1).to(said)).sum(-1).mean() / N - budget).abs()


def entropy_loss(said: Tensor) -> Tensor:
    """L_e of choices (L, B, T, N + 1): -1 where the tokens of each sample choose evenly, 0 where all choose the same."""
    a = said.mean(2)
    return (a * a.clamp(min=1e-6).log()).sum(-1).mean() / math.log(a.shape[-1])


def diversity_loss(said: Tensor) -> Tensor:
    """L_d of choices (L, B, T, N + 1): -2 times the mean difference of two samples in learners a token, over N + 1."""
    mean = (said * torch.arange(said.shape[-1]).to(said)).mean((0, 2, 3))
    return -2 * (mean[:, None] - mean).abs().mean()


def loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator, **conditions: Any
         ) -> dict[str, Tensor]:
    """Phase III: the training loss of a converted model as `loss`, and for show its part `task` and the `share` that runs.

    Args:
        noising: of the pipeline's scheduler.
        x0: (B, C, H, W), clean latents.
        step, random: of the training, not needed here; of timesteps, noise and choices.
        conditions: further inputs of the model, such as `class_labels`.

    Raises:
        ValueError: not converted, in training mode, or with gradient checkpointing.
    """
    modules = _acms(model)
    check_trainable(model)
    config, noisy = modules[0].config, noising.sample(x0, random)
    with drawn(modules, random):
        task = noising.loss(model(noisy.x, timestep=noisy.t, return_dict=False, **conditions)[0], noisy)
        if config.fixed:
            return {"loss": task, "task": task, "share": task.new_tensor(config.fixed / config.learners)}
        said = torch.stack([module.said for module in modules])
    terms = budget_loss(said, config.budget), entropy_loss(said), diversity_loss(said)
    share = said.detach().argmax(-1).float().mean() / config.learners
    return {"loss": task + sum(w * term for w, term in zip(config.weights, terms, strict=True)), "task": task, "share": share}


def training(pipe: Any, config: Config) -> Iterator[Stage]:
    """How the bundled DiT is trained on digits in three phases, by `python tools/train_zoo.py --method acm`."""
    plain, model = pipe.transformer, convert(pipe.transformer, config)

    def copying(part: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
        def part_loss(model: nn.Module, noising: Noising, x0: Tensor, *, step: int, random: torch.Generator, **more: Any
                      ) -> dict[str, Tensor]:
            noisy = noising.sample(x0, random)
            return {"loss": part(model, seen(plain.to(x0.device), lambda m: m(noisy.x, timestep=noisy.t, **more)))}
        return part_loss

    for part, names, steps, lr in ((distillation, ("ff.up", "ff.down"), 60, 8e-3), (imitation, ("ff.gate",), 40, 5e-2)):
        if part is distillation or config.fixed is None:
            train_only(model, names)
            yield labelled(pipe, model, copying(part), steps=steps, lr=lr)
    train_only(model, config.tuned)
    yield labelled(pipe, model, loss, steps=100, lr=5e-3)
