"""Packages of others that accelerate a diffusers pipeline, each put on for as long as a context lasts.

    with tomesd(pipe, ratio=0.5): pipe(...)

They are run as they were released. What they refuse, or break on, is part of what is measured: on a pipeline they are not
made for, each raises an error of its own. The bench loads a new pipeline after each.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from accel_tools.measure.arms import Arm


@contextmanager
def tomesd(pipe: Any, ratio: float = 0.5, random: bool = True) -> Iterator[None]:
    """ToMe, the authors' package."""
    from tomesd import apply_patch, remove_patch
    apply_patch(pipe, ratio=ratio, use_rand=random)
    try:
        yield
    finally:
        remove_patch(pipe)


@contextmanager
def deepcache(pipe: Any, interval: int = 3) -> Iterator[None]:
    """DeepCache, the authors' package."""
    from DeepCache import DeepCacheSDHelper
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextmanager
def tgate(pipe: Any, gate_step: int = 10) -> Iterator[None]:
    """T-GATE, the authors' package. It is a call of its own on the pipeline, to which the ordinary call is led here; the
    forwards that it leaves on the layers are taken off."""
    from tgate import TgateSDLoader
    gated, kind = TgateSDLoader(pipe), type(pipe)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.tgate(*args, gate_step=gate_step, sp_interval=1, fi_interval=1, warm_up=0, **kwargs)
    gated.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    try:
        yield
    finally:
        gated.__class__ = kind
        for module in pipe.unet.modules():
            vars(module).pop("forward", None)


@contextmanager
def cache_dit(pipe: Any, threshold: float = 0.08, warmup: int = 4) -> Iterator[None]:
    """DBCache of the package cache-dit: the first block decides whether the others are computed."""
    import cache_dit
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=warmup, residual_diff_threshold=threshold))
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


@contextmanager
def _hooked(pipe: Any, config: Any) -> Iterator[None]:
    """A cache that diffusers brings along, on the pipeline's transformer."""
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def faster_cache(pipe: Any, skip: int = 2, tensor_format: str = "BCHW") -> AbstractContextManager[None]:
    from diffusers import FasterCacheConfig
    return _hooked(pipe, FasterCacheConfig(
        spatial_attention_block_skip_range=skip, spatial_attention_timestep_skip_range=(-1, 681),
        unconditional_batch_timestep_skip_range=(-1, 781), attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep, tensor_format=tensor_format))


def pyramid_attention_broadcast(pipe: Any, skip: int = 2) -> AbstractContextManager[None]:
    from diffusers import PyramidAttentionBroadcastConfig
    return _hooked(pipe, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip, spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: pipe.current_timestep))


def first_block_cache(pipe: Any, threshold: float = 0.08) -> AbstractContextManager[None]:
    from diffusers import FirstBlockCacheConfig
    return _hooked(pipe, FirstBlockCacheConfig(threshold=threshold))


def taylorseer(pipe: Any, interval: int = 3) -> AbstractContextManager[None]:
    from diffusers import TaylorSeerCacheConfig
    return _hooked(pipe, TaylorSeerCacheConfig(
        cache_interval=interval, cache_identifiers=[r"transformer_blocks\.\d+\.(attn\d?|ff)"]))


@dataclass(frozen=True)
class Peer:
    """How to put on the package of this `distribution`, and the `config` it is measured with."""

    distribution: str
    on: Callable[..., AbstractContextManager[None]]
    config: dict[str, Any] = field(default_factory=dict)


PEERS = {
    "tomesd": Peer("tomesd", tomesd, {"ratio": 0.5}),
    "DeepCache": Peer("DeepCache", deepcache, {"interval": 3}),
    "tgate": Peer("tgate", tgate, {"gate_step": 10}),
    "cache-dit DBCache": Peer("cache-dit", cache_dit, {"threshold": 0.12}),
    "diffusers FasterCache": Peer("diffusers", faster_cache, {"skip": 2}),
    "diffusers PAB": Peer("diffusers", pyramid_attention_broadcast, {"skip": 2}),
    "diffusers FirstBlockCache": Peer("diffusers", first_block_cache, {"threshold": 0.12}),
    "diffusers TaylorSeer": Peer("diffusers", taylorseer, {"interval": 3}),
}


@dataclass(frozen=True)
class PeerArm(Arm):
    """`steps` of the sampler under the package that PEERS lists as `peer`."""

    peer: str = ""
    version: str = ""

    @contextmanager
    def applied(self, target: Any) -> Iterator[None]:
        with PEERS[self.peer].on(target, **self.config):
            yield None


def installed(steps: int) -> list[PeerArm]:
    """An arm for each package that can be imported here."""
    found = []
    for name, peer in PEERS.items():
        try:
            found.append(PeerArm(steps, config=peer.config, peer=name, version=version(peer.distribution)))
        except PackageNotFoundError:
            continue
    return found
