"""What every recipe of the zoo shares: a run that continues exactly where it stopped, and what it leaves behind."""
from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accel_tools.catalog import ROOT
from accel_tools.zoo.machine import hardware

ZOO = ROOT / "methods/_zoo"
CHECKPOINTS = ROOT / "build/zoo"
SCHEDULER = dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing",
                 rescale_betas_zero_snr=True, clip_sample=False)         # of all models that say v
POSITIONS = "pos_embed.pos_embed"                 # constants that the models recompute


@cache
def device() -> torch.device:
    """Where to train: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Run:
    """Everything a training run needs to continue exactly: weights, averages, optimiser, random state, history."""

    model: nn.Module
    steps: int
    lr: float
    average: float                               # decay of the exponential moving average of the weights
    matrices: float | None = None                # learning rate of Muon for the matrices of the blocks; None: AdamW does all
    rates: Mapping[str, float] = field(default_factory=dict)     # times `lr`, of parameters whose names begin so
    seed: int = 0
    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[float, ...]] = field(default_factory=list)     # step and what is shown
    shown: tuple[str, ...] = ("loss",)

    def __post_init__(self):
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        by_muon = {} if self.matrices is None else dict(block_matrices(self.model))
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in self.model.named_parameters():
            if name not in by_muon and weight.requires_grad:
                rate = next((rate for start, rate in self.rates.items() if name.startswith(start)), 1.0)
                groups.setdefault(self.lr * rate, []).append(weight)
        self.optimizers = [torch.optim.AdamW([{"params": weights, "lr": lr} for lr, weights in groups.items()],
                                             betas=(0.9, 0.99), weight_decay=0.01)]
        if by_muon:
            self.optimizers.append(torch.optim.Muon(by_muon.values(), lr=self.matrices, weight_decay=0.01,
                                                    adjust_lr_fn="match_rms_adamw"))
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.random = torch.Generator().manual_seed(self.seed)

    def update(self, loss: Tensor) -> None:
        """One optimiser step with warm-up and cosine decay; the average follows."""
        rate = min(1.0, (self.step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group, lr in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = lr * rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for kept, new in zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True):
                if kept.is_floating_point():
                    kept.lerp_(new, 1 - decay)
                else:
                    kept.copy_(new)

    def after(self, first: Run) -> Run:
        """This run with the history of the one before it put in front."""
        self.losses = [(step - first.steps, *shown) for step, *shown in first.losses] + self.losses
        self.seconds += first.seconds
        return self

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "averaged": self.averaged.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "random": self.random.get_state(),
                 "torch": torch.get_rng_state(),
                 "step": self.step, "steps": self.steps, "seconds": self.seconds, "losses": self.losses,
                 "shown": self.shown}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=device())
        if state["steps"] != self.steps:
            raise ValueError(f"{path} belongs to a run of {state['steps']} steps, not {self.steps}: delete it to start anew")
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.random.set_state(state["random"].cpu())
        torch.set_rng_state(state["torch"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.shown = state["losses"], state.get("shown", self.shown)


def block_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of the linear layers of a transformer's blocks, but for those that modulate norms, by their names."""
    for name, weight in model.named_parameters():
        if "transformer_blocks." in name and weight.ndim == 2 and ".norm" not in name:
            yield name, weight


def train(run: Run, loss_of, path: Path, *, until: int | None = None, save_every: int = 250) -> None:
    """Call `loss_of(run)` until `run.steps` (or `until`), resuming from `path` when it exists. It returns the loss, a scalar,
    or a dict of scalars that holds it as "loss" and others to be shown."""
    if path.exists():
        run.load(path)
        print(f"continuing {path.stem} at step {run.step} of {run.steps}", flush=True)
    end = min(run.steps, until or run.steps)
    recent, clock = [], time.perf_counter()
    while run.step < end:
        found = loss_of(run)
        terms = found if isinstance(found, dict) else {"loss": found}
        run.update(terms["loss"])
        run.shown = ("loss", *(name for name in terms if name != "loss"))
        recent.append(torch.stack([terms[name].detach() for name in run.shown]))
        if run.step % 50 == 0 or run.step == end:
            elapsed = time.perf_counter() - clock
            run.seconds += elapsed
            clock += elapsed
            means = [round(mean, 5) for mean in torch.stack(recent).mean(0).tolist()]
            run.losses.append((run.step, *means))
            left = elapsed / len(recent) * (run.steps - run.step)
            shown = "  ".join(f"{name} {mean:.4f}" for name, mean in zip(run.shown, means, strict=True))
            print(f"step {run.step:6d}/{run.steps}  {shown}  {left / 60:5.1f} min left", flush=True)
            recent = []
        if run.step % save_every == 0 or run.step == end:
            run.save(path)


def conditional(run: Run, x: Tensor, prompts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A batch of `x` (N, ...) with its prompts; one in ten gets the empty prompt, the last of `prompts` (N + 1, L)."""
    index = torch.randint(len(x), (size,), generator=run.random)
    dropped = torch.rand(size, generator=run.random) < 0.1
    return x[index], prompts[torch.where(dropped, len(x), index)]


def batch(run: Run, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    index = torch.randint(len(x), (size,), generator=run.random)
    return x[index], y[index]


def zero(*layers: nn.Linear) -> None:
    """Start `layers` at zero, weights and biases; the library's transformers do not."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def position_embedding(side: int, of: int, dim: int) -> Tensor:
    """Sine-cosine positions of a side x side grid laid over an of x of grid. -> (1, side^2, dim)"""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
    at = (torch.arange(side, dtype=torch.float32) + 0.5) * of / side - 0.5
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy")).reshape(2, 1, side, side)
    return get_2d_sincos_pos_embed_from_grid(dim, grid, output_type="pt").float()[None]


def carry(small: nn.Module, large: nn.Module) -> None:
    """Give `large` the weights of `small`, but for the positions, which are constants of the grid."""
    state = {name: value for name, value in small.state_dict().items() if not name.endswith(POSITIONS)}
    missing, unexpected = large.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith(POSITIONS) for name in missing):
        raise ValueError(f"the two models differ in more than their positions: missing {missing}, unexpected {unexpected}")


@dataclass
class Trained:
    """What a recipe returns: the run, of which the averaged weights are kept, and what the card says of it.

    `config` rebuilds the model, of a class that the vocabulary's `family` names; `batch` images a step at the end; `more` is
    put on the card as it is.
    """

    run: Run
    config: dict[str, Any]
    batch: int
    data: str
    family: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, seed: int) -> None:
        """methods/_zoo/<name>.safetensors in half precision, and its card <name>.json."""
        weights = ZOO / f"{name}.safetensors"
        state = {key: value.half() if value.is_floating_point() else value
                 for key, value in self.run.averaged.state_dict().items() if not key.endswith(POSITIONS)}
        save_file({key: value.contiguous().cpu() for key, value in state.items()}, weights)
        run = self.run
        write_card(name, {
            "name": name, "space": "pixel", **({"family": self.family} if self.family else {}), "config": self.config,
            "data": self.data,
            "command": f"python tools/train_zoo.py {name}", "seed": seed, "steps": run.steps, "batch": self.batch,
            "seconds": round(run.seconds), "hardware": hardware(), "torch": torch.__version__,
            "bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "metrics": self.metrics, "loss": run.losses[:: max(1, len(run.losses) // 100)], **self.more})


def write_card(name: str, card: dict[str, Any]) -> None:
    (ZOO / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
