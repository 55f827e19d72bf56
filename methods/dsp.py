"""DSP - DSP: Dynamic Sequence Parallelism for Multi-Dimensional Transformers

Xuanlei Zhao, Shenggan Cheng, Chang Chen, Zangwei Zheng, Ziming Liu, Zheming Yang, Yang You, ICML 2025. arXiv:2403.10266.
Code: NUS-HPC-AI-Lab/VideoSys

Idea: a block that attends over places needs all places of a frame, but not all frames; one that attends over time the other
way round. So each process has a part of the places. Temporal blocks need nothing from others; before a spatial attention one
all-to-all turns the cut from places to frames, behind it another one turns it back. What works token by token runs on any cut.

Map
    Split, behind the embedding                       _Parallel.enter
    Switch(i -> j)                                    methods._core.processes.Processes.switch
    Gather, before the last layer                     _Parallel.leave
    switches around the attention over places         _Parallel.attend
    padding of a dimension, cut off before attention  methods._core.processes.Processes.padded, Processes.switch
    bytes of one pair of blocks, beside others        volumes

Departures
    It works for models whose blocks all attend over the same axis, too: there samples take the place of frames, as the paper
    has it for images. Where there are fewer samples than processes, some attend to padding.
    Frames of all samples are shared out together, as they lie in the batch, so that fewer of them are padding.
    The official Latte is cut along its frames and switches around the temporal attention. Here it is cut along its places, as
    the official Open-Sora is, for its positions in time are added between two blocks; the bytes are the same.
    The text is the same in all processes. Of two streams the text's attention output is given to all of them.
    The official gather takes CUDA tensors alone. A block of its own for all of a batch's halves of guidance is left out.

Example
    >>> from methods import dsp
    >>> {name: round(share, 4) for name, share in dsp.volumes(1.0, 8).items()}      # of the activations' bytes, 8 processes
    {'dsp': 0.2188, 'ulysses': 0.4375, 'ring': 1.75, 'megatron': 7.0}
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from methods._core.context import StepContext, experts
from methods._core.denoiser import Block
from methods._core.patch import Patch
from methods._core.processes import Processes
from methods._core.site import Claim

__all__ = ["Config", "apply", "volumes"]


@dataclass(frozen=True, kw_only=True)
class Config:
    compare: bool = False         # report by the closed form, too, "bytes switched", and what others would send in their place:
                                  # "bytes ulysses", "bytes ring"


def volumes(size: float, processes: int) -> dict[str, float]:
    """Bytes that each of N processes sends for a temporal and a spatial block over activations of `size` bytes M.

    "dsp": two switches of one tensor. "ulysses": queries, keys, values and the output of the one attention that needs others,
    2M (N - 1) / N^2 twice. "ring": keys and values go round. "megatron": gathers and scatters around attention and MLP of both.
    """
    n = processes
    switch = size / n * (n - 1) / n
    return {"dsp": 2 * switch, "ulysses": 4 * switch, "ring": 2 * size * (n - 1) / n, "megatron": 8 * size * (n - 1) / n}


class _Parallel:
    """What one process does with its part. The host sets `samples`, of the latent, and `places`, of one or of a frame."""

    def __init__(self, patch: Patch, processes: Processes, compare: bool):
        self.patch, self.processes, self.compare = patch, processes, compare
        self.samples = self.places = 0
        self.taken = 0                                       # bytes that were there when the present call began

    def enter(self, block: Block, forward: Callable, *args, **kwargs) -> Any:
        """Split: the first block gets this process's part of the image's tokens (B, S, C)."""
        image = block.streams(args, kwargs)[0]
        return self.given(forward, {id(image): self.part(image, 1)}, args, kwargs)

    def temporal(self, forward: Callable, x: Tensor, *args, **kwargs) -> Any:
        """Of arguments (B S, ...) a temporal block gets the rows of its own places."""
        def mine(value: Any) -> Any:
            if not torch.is_tensor(value) or not value.ndim or len(value) != self.samples * self.places:
                return value
            return self.part(value.unflatten(0, (self.samples, self.places)), 1).flatten(0, 1)
        return forward(x, *map(mine, args), **{name: mine(value) for name, value in kwargs.items()})

    def attend(self, block: Block, forward: Callable, *args, **kwargs) -> Any:
        """Switch from places to samples and frames, attend, and switch back."""
        processes, call = self.processes, block.call(args, kwargs)
        rows = len(call.x)
        tables = {name.partition(".")[0] for name, axis in block.row.along.items() if axis == 0}

        def mine(value: Any) -> Any:
            if value is call.x:
                return processes.switch(value, 0, 1, self.places)
            if isinstance(value, tuple):
                return tuple(map(mine, value))
            by_row = torch.is_tensor(value) and value.ndim and len(value) == rows > 1
            return self.part(value, 0) if by_row else value          # one row is for the first process, the others pad

        given = {name: value if name in tables else mine(value) for name, value in call.given.items()}
        self.count(call.x, rows)
        out = forward(**given)
        image, *rest = out if isinstance(out, tuple) else (out,)
        image = processes.switch(image, 1, 0, rows)
        rest = [processes.join(each, 0, rows) if torch.is_tensor(each) else each for each in rest]
        return (image, *rest) if isinstance(out, tuple) else image

    def count(self, x: Tensor, rows: int) -> None:
        n = self.processes.size
        whole = -(-rows // n) * n * x[0].numel() * n * x.element_size()
        self.patch.counts["switches"] += 2
        for name, word in (("dsp", "switched"), ("ulysses", "ulysses"), ("ring", "ring")) if self.compare else ():
            self.patch.counts[f"bytes {word}"] += round(volumes(whole, n)[name])

    def leave(self, forward: Callable, *args, **kwargs) -> Any:
        """Gather: the last layer gets all tokens."""
        found = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        out = self.given(forward, {id(found): self.processes.join(found, 1, self.places)}, args, kwargs)
        self.patch.counts["bytes sent"] += self.processes.sent - self.taken
        self.taken = self.processes.sent
        return out

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This process's even part of x, padded."""
        return self.processes.padded(x, dim).chunk(self.processes.size, dim)[self.processes.rank]

    @staticmethod
    def given(forward: Callable, new: dict[int, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        return forward(*(new.get(id(x), x) for x in args), **{name: new.get(id(x), x) for name, x in kwargs.items()})


def _served(patch: Patch) -> list[Block]:
    """The blocks, if all but their attention works token by token on a stream (B, S, C) of the image's, up to the tail."""
    denoiser = patch.denoiser
    blocks = denoiser.chain if denoiser.tail is not None and denoiser.row.latents == 1 and denoiser.row.by_sample else ()
    alone = all(block.stream != "fused" and block.row.product != "none" and block.row.sequence_axis == 1 and not any(
        "pos" in name for name in inspect.signature(type(block.module).forward).parameters) for block in blocks)
    return patch.require(blocks if alone else (), "chain of blocks that work token by token, but for their attention, on the "
                                                  "image's tokens alone")


def _share(target: Any, processes: Processes, config: Config) -> Patch:
    """Put it on one transformer."""
    patch = Patch(target, "dsp")
    blocks = _served(patch)
    spatial = [block for block in blocks if not block.temporal]
    if processes.size == 1:
        return patch
    share = _Parallel(patch, processes, config.compare)
    patch.around(blocks[0].module, partial(share.enter, blocks[0]), Claim.WHOLE)
    patch.around(patch.denoiser.tail, share.leave, Claim.WHOLE)
    for block in blocks:
        if block.temporal:
            patch.around(block.module, share.temporal, Claim.WHOLE)
        else:
            for attn in block.self_attentions:
                patch.around(attn, partial(share.attend, block), Claim.TOKENS)
        patch.claim([block.module], Claim.WHOLE)

    def decide(context: StepContext) -> None:
        time = context.inputs.get(patch.denoiser.row.time)
        if patch.denoiser.adds_between(context.inputs) or context.behind or torch.is_tensor(time) and time.ndim > 1:
            raise ValueError("dsp shares out the tokens of the model alone: not those of a ControlNet, of references, or with "
                             "times of their own")
        share.samples, share.places = len(context.sample), math.prod(context.grid(spatial[0]))
        share.taken = processes.sent
        reached = torch.tensor([[patch.reaches(block.attn) for block in spatial]], dtype=torch.uint8,
                               device=context.sample.device)
        if len(patch.run.patches) > 1 and not (processes.join(reached, 0, processes.size) == reached).all():
            raise RuntimeError("dsp: a cache beside it does not skip the same layers in all processes, for it decides from the "
                               "tokens of its own: use one that decides from the step")
        patch.tally(1 - 1 / processes.size, 1)

    patch.each_call(decide)
    return patch.on()


def apply(target: Any, group: Any = None, config: Config = Config()) -> Patch:
    """Share the tokens of a transformer out to the processes of `group`, which all call this on their own copy of it.

    Args:
        target: a diffusers pipeline, whose transformers are all shared out, or one of them. All processes run it with the
            same inputs.
        group: of torch.distributed; None: the default group, or this process alone.

    Raises:
        ValueError: a model whose tokens cannot be shared out so, or already applied; in a run, a ControlNet beside it, or
            tokens with times of their own. RuntimeError: another process ended, or a cache beside it does not skip the same
            layers in all of them.
    """
    processes = Processes(group, "dsp")
    first, *others = experts(target)
    patch = _share(first, processes, config)
    try:
        patch.also += [_share(expert, processes, config) for expert in others]
    except BaseException:
        patch.remove()
        raise
    return patch
