"""Train a small model of the zoo on real images: `python tools/train_zoo.py judge|dit`.

Runs on a CPU in under two hours or on a GPU unchanged. It writes a checkpoint every few hundred steps to
`build/zoo/<name>.ckpt` and continues exactly where it stopped when called again (the checkpoint holds weights, averages,
optimiser and random state). At the end it writes `methods/_zoo/<name>.safetensors` (fp16) and its card
`methods/_zoo/<name>.json`, measured by the judge.
"""
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from accel_tools import digits
from accel_tools.arms import sample
from accel_tools.quality import quality

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "methods/_zoo"
CHECKPOINTS = ROOT / "build/zoo"
DIT = dict(num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=6, sample_size=32,
           patch_size=2, num_embeds_ada_norm=1000)     # the pipeline hard-codes 1000 as the null class
SCHEDULER = dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing",
                 rescale_betas_zero_snr=True, clip_sample=False)
NULL_CLASS = 1000


@dataclass
class Run:
    """Everything a training run needs to continue exactly: weights, averages, optimiser, random state, history."""

    model: nn.Module
    steps: int
    lr: float
    average: float                               # decay of the exponential moving average of the weights
    seed: int = 0
    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self):
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.random = torch.Generator().manual_seed(self.seed)

    def update(self, loss: Tensor) -> None:
        """One optimiser step with warm-up and cosine decay; the average follows."""
        warm = min(1.0, (self.step + 1) / 200)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for kept, new in zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True):
                if kept.is_floating_point():
                    kept.lerp_(new, 1 - decay)
                else:
                    kept.copy_(new)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "averaged": self.averaged.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "random": self.random.get_state(),
                 "torch": torch.get_rng_state(),
                 "step": self.step, "steps": self.steps, "seconds": self.seconds, "losses": self.losses}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path)
        if state["steps"] != self.steps:
            raise ValueError(f"{path} belongs to a run of {state['steps']} steps, not {self.steps}: delete it to start anew")
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]


def train(run: Run, loss_of, path: Path, *, until: int | None = None, save_every: int = 250) -> None:
    """Call `loss_of(run) -> scalar` until `run.steps` (or `until`), resuming from `path` when it exists."""
    if path.exists():
        run.load(path)
        print(f"continuing {path.stem} at step {run.step} of {run.steps}", flush=True)
    end = min(run.steps, until or run.steps)
    recent, clock = [], time.perf_counter()
    while run.step < end:
        loss = loss_of(run)
        run.update(loss)
        recent.append(loss.detach())
        if run.step % 50 == 0 or run.step == end:
            elapsed = time.perf_counter() - clock
            run.seconds += elapsed
            clock += elapsed
            run.losses.append((run.step, round(float(torch.stack(recent).mean()), 5)))
            left = elapsed / len(recent) * (run.steps - run.step)
            print(f"step {run.step:6d}/{run.steps}  loss {run.losses[-1][1]:.4f}  {left / 60:5.1f} min left", flush=True)
            recent = []
        if run.step % save_every == 0 or run.step == end:
            run.save(path)


def batch(run: Run, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    index = torch.randint(len(x), (size,), generator=run.random)
    return x[index], y[index]


# ---- the judge ---------------------------------------------------------------------------------------------------------

def jitter(x: Tensor, random: torch.Generator) -> Tensor:
    """A small random rotation, scale, shear and shift of each image."""
    angle, shear, grow, dx, dy = ((torch.rand(5, len(x), generator=random) * 2 - 1)
                                  * torch.tensor([0.25, 0.2, 0.12, 0.12, 0.12])[:, None])
    row0 = torch.stack([(1 + grow) * angle.cos(), shear - angle.sin(), dx], -1)
    row1 = torch.stack([angle.sin(), (1 + grow) * angle.cos(), dy], -1)
    grid = F.affine_grid(torch.stack([row0, row1], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train_judge(seed: int, scale: float) -> None:
    from methods._zoo.judge import Judge
    torch.manual_seed(seed)
    x, y = digits.split(held_out=False)

    def loss_of(run):
        run.model.train()
        images, labels = batch(run, x, y, 128)
        return F.cross_entropy(run.model(jitter(images, run.random)), labels, label_smoothing=0.05)

    run = Run(Judge(), steps=round(1500 * scale), lr=2e-3, average=0.99, seed=seed)
    train(run, loss_of, CHECKPOINTS / "judge.ckpt")
    judge = run.averaged.eval()
    weights = write_weights("judge", judge)
    metrics = judge_metrics()
    write_card("judge", weights, run, seed=seed, config={}, metrics=metrics, batch=128,
               data=f"npm {digits.PACKAGE}: 8,000 training images, 2,000 held out; random rotation, scale, shear, shift")


@torch.no_grad()
def judge_metrics() -> dict:
    """Held-out accuracy; and the Frechet distance between disjoint real sets, the floor of every other one."""
    from methods._zoo import judge as zoo_judge
    from methods._zoo import load_judge
    judge = load_judge()
    x, y = digits.split(held_out=True)
    features = judge.features(x)
    accuracy = float((judge.head(features).argmax(-1) == y).float().mean())
    reference = zoo_judge.moments(features[:1000])          # half A is the reference, half B stands for "as good as real"
    save_file({"mean": reference[0].contiguous(), "cov": reference[1].contiguous()}, ZOO / "judge_reference.safetensors")
    real = zoo_judge.frechet(*zoo_judge.moments(features[1000:1500]), *reference)
    return {"held_out_accuracy": round(accuracy, 4), "frechet_real_vs_real": round(real, 4), "frechet_n": 500}


# ---- the digit DiT -----------------------------------------------------------------------------------------------------

def adaln_zero(model: nn.Module) -> None:
    """Start every block as the identity and the output at zero; the library's class does not."""
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def position_embedding(side: int, of: int, dim: int) -> Tensor:
    """Sine-cosine positions of a side x side grid laid over an of x of grid. -> (1, side^2, dim)"""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
    at = (torch.arange(side, dtype=torch.float32) + 0.5) * of / side - 0.5
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy")).reshape(2, 1, side, side)
    return get_2d_sincos_pos_embed_from_grid(dim, grid, output_type="pt").float()[None]


def train_dit(seed: int, scale: float) -> None:
    """First at 16x16 (64 tokens, four times cheaper), then at 32x32 with the same weights: positions carry over."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = digits.split(held_out=False)
    scheduler = DDIMScheduler(**SCHEDULER)
    signal, noise_level = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()

    def loss_at(images, per_step):
        def loss_of(run):
            x0, label = batch(run, images, y, per_step)
            label = torch.where(torch.rand(per_step, generator=run.random) < 0.1, NULL_CLASS, label)
            spread = torch.randperm(per_step, generator=run.random) + torch.rand(per_step, generator=run.random)
            t = (spread / per_step * 1000).long().clamp(max=999)               # stratified: a batch covers all noise levels
            noise = torch.randn(x0.shape, generator=run.random)
            a, s = signal[t].view(-1, 1, 1, 1), noise_level[t].view(-1, 1, 1, 1)
            noisy, target = a * x0 + s * noise, a * noise - s * x0                  # v-prediction
            with torch.autocast(device, dtype=torch.bfloat16):
                v = run.model(noisy.to(device), t.to(device), label.to(device)).sample
            return F.mse_loss(v.float(), target.to(device))
        return loss_of

    # eval mode throughout: the class drops labels in each block separately when training; labels are dropped above
    small = DiTTransformer2DModel(**DIT | {"sample_size": 16}).eval().to(device)
    adaln_zero(small)
    dim = DIT["num_attention_heads"] * DIT["attention_head_dim"]
    small.pos_embed.pos_embed = position_embedding(8, 16, dim).to(device)
    first = Run(small, steps=round(2400 * scale), lr=1.5e-3, average=0.999, seed=seed)
    train(first, loss_at(F.avg_pool2d(x, 2), 96), CHECKPOINTS / "dit-16.ckpt")

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**DIT).eval().to(device)
    assert torch.allclose(model.pos_embed.pos_embed, position_embedding(16, 16, dim).to(device), atol=1e-5)
    carried = {k: v for k, v in first.averaged.state_dict().items() if not k.startswith("pos_embed.pos_embed")}
    model.load_state_dict(carried, strict=False)
    run = Run(model, steps=round(4000 * scale), lr=8e-4, average=0.999, seed=seed + 1)
    train(run, loss_at(x, 32), CHECKPOINTS / "dit.ckpt")

    weights = write_weights("dit", run.averaged)
    run.losses = [(s - first.steps, l) for s, l in first.losses] + run.losses
    run.seconds += first.seconds
    write_card("dit", weights, run, seed=seed, config={"transformer": DIT, "scheduler": SCHEDULER}, batch=32,
               metrics={}, data=f"npm {digits.PACKAGE}: 8,000 training images, zero-padded to 32x32; first "
               f"{first.steps} steps of 96 images at 16x16, then {run.steps} steps of 32 at 32x32; pixel space")
    card = json.loads((ZOO / "dit.json").read_text())
    card["metrics"] = sample_metrics()
    (ZOO / "dit.json").write_text(json.dumps(card, indent=1) + "\n")


def sample_metrics(n: int = 500, steps: int = 50, guidance: float = 2.0, seed: int = 0) -> dict:
    """Label accuracy, recall per class and Frechet distance of `n` images, beside the real-vs-real distance."""
    labels = [i % 10 for i in range(n)]
    images = sample(methods.tiny("dit"), steps, labels, seed=seed, guidance=guidance)
    verdict = quality(images, torch.tensor(labels))
    real = methods.card("judge")["metrics"]["frechet_real_vs_real"]
    return {"images": n, "sampler": f"DDIM, {steps} steps, guidance {guidance}, seed {seed}",
            "label_accuracy": round(verdict["label_accuracy"], 4), "recall": [round(share, 3) for share in verdict["recall"]],
            "frechet": round(verdict["frechet"], 4), "frechet_real_vs_real": real}


# ---- what is written ---------------------------------------------------------------------------------------------------

def write_weights(name: str, model: nn.Module) -> Path:
    path = ZOO / f"{name}.safetensors"
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state.pop("pos_embed.pos_embed", None)                       # a constant the class recomputes
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, path)
    return path


def write_card(name: str, weights: Path, run: Run, *, seed: int, config: dict, metrics: dict, data: str, batch: int) -> None:
    card = {"name": name, "config": config, "data": data, "command": f"python tools/train_zoo.py {name}",
            "seed": seed, "steps": run.steps, "batch": batch, "seconds": round(run.seconds),
            "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads",
            "torch": torch.__version__, "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "metrics": metrics,
            "loss": run.losses[:: max(1, len(run.losses) // 100)]}
    (ZOO / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")


RECIPES = {"judge": train_judge, "dit": train_dit}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of steps")
    args = parser.parse_args(argv)
    RECIPES[args.name](args.seed, args.scale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
