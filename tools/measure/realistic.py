"""Methods on models of real size with random weights: what share of the saved arithmetic arrives as saved time.

A model's speed does not depend on its weights, so these need no download; their images mean nothing and are not judged.
The bound of a speed-up is plain MACs / method MACs. Official packages that are installed run beside ours.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from accel_tools.catalog.entries import Catalog
from accel_tools.measure.arms import Arm
from accel_tools.measure.cells import Cells
from accel_tools.measure.macs import count_macs
from accel_tools.measure.memory import peak_allocated
from accel_tools.measure.peers import PEERS, installed
from accel_tools.measure.records import code_hash_of, provenance
from accel_tools.measure.timing import breakdown, compare, interleave
from accel_tools.zoo.machine import hardware
from methods._zoo.pixel_vae import PixelVAE

ENOUGH = 0.85                      # share of the MAC bound below which a record says where the time went


def unet() -> StableDiffusionPipeline:
    """The UNet of Stable Diffusion 1.5 in shape: 860 M parameters, 64x64 latents."""
    model = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    return _unet_pipe(model)


def small_unet() -> StableDiffusionPipeline:
    """A UNet of 81 M parameters and 16x16 latents, on which a call is short beside what a hook might cost."""
    model = UNet2DConditionModel(
        sample_size=16, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(96, 192, 384, 384),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    return _unet_pipe(model)


def _unet_pipe(model: UNet2DConditionModel) -> StableDiffusionPipeline:
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)          # for its scale factor of 8; it decodes nothing here
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(vae, None, None, model.eval(), scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit(layers: int = 6, width: int = 768, side: int = 64) -> DiTPipeline:
    """Half the depth of a DiT-B/2 in shape: 6 blocks of width 768 over 32x32 tokens."""
    model = DiTTransformer2DModel(num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=4,
                                  num_layers=layers, sample_size=side, patch_size=2, num_embeds_ada_norm=1000)
    pipe = DiTPipeline(model.eval(), PixelVAE(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_dit() -> DiTPipeline:
    """The same blocks over 8x8 tokens, 147 M parameters."""
    return dit(side=16)


@torch.no_grad()
def latents(pipe: Any, steps: int, pixels: int | None = None) -> Tensor:
    """One run of `steps` steps, always from the same noise; the DiT is guided (a batch of two), the UNet is not.

    `pixels` is the side of a UNet's image where it is not the size the model is made for.
    """
    random = torch.Generator().manual_seed(0)
    if hasattr(pipe, "unet"):
        text = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))
        return pipe(prompt_embeds=text, num_inference_steps=steps, guidance_scale=1.0, generator=random,
                    height=pixels, width=pixels, output_type="latent").images
    return torch.from_numpy(pipe([1], num_inference_steps=steps, guidance_scale=4.0, generator=random, output_type="np").images)


@dataclass(frozen=True)
class Model:
    """A model of real size and, of a UNet, the side of its image where that is not the one it is made for."""

    label: str
    make: Callable[[], Any]
    pixels: int | None = None


MODELS = {
    "unet": Model("UNet of SD 1.5 in shape, 4,096 tokens, random weights", unet),
    "unet_256": Model("UNet of SD 1.5 in shape, 1,024 tokens, random weights", unet, pixels=256),
    "dit": Model("half a DiT-B/2 in shape, 1,024 tokens, random weights", dit),
}
SMALL = {unet: Model("UNet of 81 M parameters, random weights", small_unet),
         dit: Model("DiT of 74 M parameters, random weights", small_dit)}


@dataclass(frozen=True)
class Case:
    """A method on a model for `steps` steps, beside the package that PEERS calls `peer` where there is one."""

    model: str
    make: Callable[[], Any]
    arm: Arm
    peer: str | None = None
    pixels: int | None = None

    def run(self, pipe: Any) -> Tensor:
        return latents(pipe, self.arm.steps, self.pixels)

    def around(self, pipe: Any) -> AbstractContextManager[Any]:
        return PEERS[self.peer].on(pipe, **self.arm.config)


def cases(catalog: Catalog) -> list[Case]:
    """What the entries say is timed."""
    return [Case(model.label, model.make, Arm(run.steps, slug, run.config), run.peer, model.pixels)
            for name, model in MODELS.items()                                    # one after the other: each is built once
            for slug, entry in catalog.entries.items() for run in entry.timing if run.model == name]


def switches(catalog: Catalog) -> list[Case]:
    """The off switch of each patch that is timed, on a small model: a DiT where it is timed on one."""
    found = []
    for slug, entry in catalog.entries.items():
        if entry.timing and entry.kind == "patch":
            off = import_module(f"methods.{slug}").OFF
            config = {field.name: getattr(off, field.name) for field in fields(off)
                      if getattr(off, field.name) != getattr(type(off)(), field.name)}
            small = SMALL[dit if any(MODELS[run.model].make is dit for run in entry.timing) else unet]
            found.append(Case(small.label, small.make, Arm(2, slug, config)))
    return found


class Realistic:
    """Runs cases, keeping the last model built and every number in `cells`."""

    def __init__(self, cells: Cells, rounds: int):
        self.cells, self.rounds = cells, rounds
        self.pipe = lru_cache(maxsize=1)(_built)

    def times(self, case: Case, what: str, names: list[str]) -> dict[str, list[float]]:
        """Interleaved seconds of "plain", "again" and the named further arms."""
        def time_all() -> dict[str, list[float]]:
            pipe = self.pipe(case.make)
            around = {"method": partial(case.arm.applied, pipe)}
            if case.peer in names:
                around[case.peer] = partial(case.around, pipe)
            call = partial(case.run, pipe)
            return interleave(dict.fromkeys(["plain", *names, "again"], call), self.rounds, around)
        return self.cells.numbers(self.identity(case, what, arms=names), time_all)

    def identity(self, case: Case, what: str, **more: Any) -> dict[str, Any]:
        return {"what": what, "model": case.model, "method": case.arm.method, "config": case.arm.config,
                "steps": case.arm.steps, "rounds": self.rounds, "hardware": hardware(),
                "code": code_hash_of(case.arm.method), **more}

    def cost(self, case: Case) -> dict[str, Any]:
        """MACs and peak memory of the plain run, the method and the peer; how far the peer's output is from ours; what the
        patch reports."""
        def count() -> dict[str, Any]:
            pipe, out, found = self.pipe(case.make), {}, {}
            arms = {"plain": nullcontext, "method": partial(case.arm.applied, pipe)}
            if case.peer in {arm.peer for arm in installed(case.arm.steps)}:
                arms[case.peer] = partial(case.around, pipe)

            def run(name: str) -> None:
                out[name] = case.run(pipe)

            for name, applied in arms.items():
                with applied() as patch:
                    found[name] = {"macs": count_macs(partial(run, name))}
                    if name == "method":
                        report = patch.report()
                    found[name]["peak_bytes"] = peak_allocated(partial(case.run, pipe))
            if case.peer in out:
                scale = float(out["plain"].abs().max())
                found["peer_difference"] = float((out[case.peer] - out["method"]).abs().max()) / scale
            return found | {"report": report}
        return self.cells.numbers(self.identity(case, "realistic-cost"), count)

    def profile(self, case: Case) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            pipe = self.pipe(case.make)
            plain = breakdown(partial(case.run, pipe))
            with case.arm.applied(pipe):
                return {"plain": plain, "method": breakdown(partial(case.run, pipe))}
        return self.cells.numbers(self.identity(case, "realistic-profile"), look)

    def record(self, case: Case) -> dict[str, Any]:
        """Speed beside its MAC bound; the profile where less than `ENOUGH` of the bound is reached."""
        cost = self.cost(case)
        names = ["method", *([case.peer] if case.peer in cost else [])]
        seconds = self.times(case, "realistic-speed", names)
        arms = {"plain": compare(seconds["plain"], seconds["again"])}
        arms |= {name: compare(seconds["plain"], seconds[name]) for name in names}
        for name, arm in arms.items():
            bound = cost["plain"]["macs"] / cost[name]["macs"]
            arm |= {"steps": case.arm.steps, **cost[name], "mac_bound": bound, "share_of_bound": arm["speedup"] / bound}
        record = {"model": case.model, "config": case.arm.config, "suite": {"name": "realistic", "rounds": self.rounds},
                  "arms": arms, "report": cost["report"]}
        if case.peer in cost:
            record["peer"] = {"package": case.peer, "version": version(PEERS[case.peer].distribution),
                              "largest_difference_of_outputs": cost["peer_difference"],
                              "ours_over_peer": compare(seconds[case.peer], seconds["method"])}
        if arms["method"]["share_of_bound"] < ENOUGH:
            record["profile"] = self.profile(case)
        return record | provenance(case.arm.method)

    def overhead(self, case: Case) -> dict[str, Any]:
        """An off switch beside nothing applied: time of the one over time of the other, and the same for A/A."""
        seconds = self.times(case, "overhead", ["method"])
        arms = {}
        for name, key in (("plain", "again"), ("method", "method")):
            own, relative = compare(seconds["plain"], seconds[key]), compare(seconds[key], seconds["plain"])
            arms[name] = {"steps": case.arm.steps, "latency_s": own["latency_s"], "latency_spread": own["latency_spread"],
                          "overhead": relative["speedup"] - 1, "overhead_spread": [x - 1 for x in relative["speedup_spread"]]}
        return {"model": case.model, "config": case.arm.config, "suite": {"name": "overhead", "rounds": self.rounds},
                "arms": arms, **provenance(case.arm.method)}


def _built(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()
