"""What a transformer makes of its inputs at its start, known before the call is made, for methods that decide from it."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from methods._core.denoiser import Denoiser
from methods._core.site import bare, underneath


class _Reached(Exception):
    def __init__(self, found: Any):
        self.found = found


@torch.no_grad()
def modulated_input(denoiser: Denoiser, inputs: dict[str, Any], patched: Iterable[nn.Module]) -> Tensor:
    """What the self-attention of the first block is called with for these inputs: its tokens (B, N, C), normed, shifted and
    scaled; of two streams those of the image.

    The model runs its own embedders and the first norm, as if nothing stood around the modules of `patched`, and stops there.
    """
    skipped = denoiser.left_out(inputs)
    block = next(block for block in denoiser.blocks if id(block.module) not in skipped)

    def reach(*args, **kwargs):
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    with bare(patched), _called(block.module, block.module.forward), _called(block.attn, reach):
        return _until_reached(denoiser, inputs)


@torch.no_grad()
def first_blocks(denoiser: Denoiser, inputs: dict[str, Any], patched: Iterable[nn.Module], count: int) -> tuple[Tensor, Any]:
    """What the first `count` blocks add for these inputs to the tokens (B, N, C), of two streams to those of the image, and all
    that the last of them gives.

    The model runs its own embedders and those blocks, as if nothing stood around the modules of `patched`, and stops there.
    """
    first, last = denoiser.chain[0], denoiser.chain[count - 1]
    before: list[Tensor] = []
    with bare(patched):
        start, forward = first.module.forward, last.module.forward

        def enter(*args, **kwargs):
            before.append(first.streams(args, kwargs)[0].clone())       # some blocks write into what they are given
            return start(*args, **kwargs)

        def reach(*args, **kwargs):
            out = (enter if last is first else forward)(*args, **kwargs)
            raise _Reached((last.split(out)[0] - before[0], out))

        with _called(first.module, enter), _called(last.module, reach):
            return _until_reached(denoiser, inputs)


def _until_reached(denoiser: Denoiser, inputs: dict[str, Any]) -> Any:
    """Call the model. -> what was found where it was stopped"""
    own = {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}     # models pop from them
    try:
        underneath(denoiser.model, **own)
    except _Reached as reached:
        return reached.found
    raise RuntimeError(f"the first block of this {type(denoiser.model).__name__} was not reached")


def relative_change(new: Tensor, old: Tensor) -> float:
    """Relative L1 distance of two tensors of one shape: mean |new - old| / mean |old|, one number for the whole batch."""
    new, old = new.float(), old.float()
    return float((new - old).abs().mean() / old.abs().mean())


@contextmanager
def _called(module: nn.Module, function: Callable) -> Iterator[None]:
    """Within it a call of `module` is one of `function`, past what was compiled: no exception gets out of a graph."""
    there = "_compiled_call_impl" in vars(module)
    compiled = module._compiled_call_impl
    module._compiled_call_impl = function
    try:
        yield
    finally:
        if there:
            module._compiled_call_impl = compiled
        else:
            del module._compiled_call_impl
