"""Where functions stand around the forward of a module, in what order, and which may stand there together.

Every patched module holds one `Site`: the *arounds* `around(forward, *args, **kwargs)` of all who stand on it, outermost
first, so that each can come off in any order. The site sits below the hooks of accelerate, which may be put on and taken off
again while it is there.
"""
from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from torch import nn


class Claim(IntEnum):
    """What a patch claims of a module. Arounds stand in this order, outermost first."""

    CALL = 0          # of the denoiser: is told of every call; all patches claim it
    SOLVER = 1        # of the denoiser: its latent and timestep, and the steps of the scheduler
    GUIDANCE = 2      # of the denoiser: which branches of guidance run
    CROP = 3          # of the denoiser: which part of the frame runs
    SKIP = 4          # of the denoiser: whether it runs at all
    OUTPUT = 5        # keeps what the module gives, and gives it again
    TOKENS = 6        # shortens the tokens that the module works on
    INSIDE = 7        # stands at the attention product, among all of the tokens
    LOOK = 8          # only looks
    WHOLE = 9         # leaves room for nobody else


SHARED = {Claim.SOLVER: "both replace the steps of the solver", Claim.GUIDANCE: "both say which branches of guidance run",
          Claim.CROP: "both cut the frame", Claim.SKIP: "both give the output of", Claim.OUTPUT: "both cache the output of",
          Claim.TOKENS: "both reduce the tokens of", Claim.INSIDE: "both change the attention of"}


def conflict(mine: Claim, name: str, theirs: Claim, other: str) -> str | None:
    """Why `name` and `other` cannot make these claims of one module, or None where they can."""
    if Claim.LOOK in (mine, theirs):
        return None
    if Claim.WHOLE in (mine, theirs):
        return f"{name if mine == Claim.WHOLE else other} leaves room for nobody else in"
    if {mine, theirs} == {Claim.TOKENS, Claim.INSIDE}:
        return SHARED[Claim.INSIDE]
    return SHARED.get(mine) if mine == theirs else None


class Site:
    """The arounds of one module, and the forward they end in."""

    def __init__(self, module: nn.Module):
        self.slot = "_old_forward" if "_old_forward" in vars(module) else "forward"     # below a hook of accelerate
        self.forward = type(module).forward                 # held as a function: the compiler does not look it up on a class
        found = vars(module).get(self.slot)
        self.original = None if getattr(found, "__func__", None) is self.forward else found    # an instance-level forward
        self.arounds: list[tuple[Claim, Any, Callable]] = []

    def __reduce_ex__(self, protocol):
        if not self.arounds:                                # left behind below the hook of another library: a copy has its own
            return object.__new__, (Site,), vars(self)
        raise RuntimeError("a patched model cannot be copied or pickled: the copy would share its state; remove the patches "
                           f"({', '.join(dict.fromkeys(owner.name for _, owner, _ in self.arounds if owner.name))}) first")


def attach(module: nn.Module, owner: Any, claim: Claim, around: Callable) -> None:
    """Call `around(forward, *args, **kwargs)` in place of `module.forward`, among the other arounds by its claim."""
    site = vars(module).get("_patch_site")
    if site is None:
        site = module._patch_site = Site(module)
        setattr(module, site.slot, types.MethodType(_patched_forward, module))
    site.arounds.append((claim, owner, around))
    site.arounds.sort(key=lambda entry: entry[0])


def detach(module: nn.Module, owner: Any) -> None:
    """Take off all arounds of `owner`; with the last around the module is as it was."""
    site = vars(module).get("_patch_site")
    if site is None:
        return
    site.arounds = [entry for entry in site.arounds if entry[1] is not owner]
    if site.arounds:
        return
    for slot in ("forward", "_old_forward"):                # hooks may have come or gone since: look where it is now
        if getattr(vars(module).get(slot), "__func__", None) is _patched_forward:
            if site.original is not None:
                setattr(module, slot, site.original)
            elif slot == "forward":
                del module.forward
            else:
                setattr(module, slot, types.MethodType(site.forward, module))
            del module._patch_site
            return
    # else another library holds our forward inside its own: it stays there, empty, and passes through


@contextmanager
def bare(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it these modules run without their arounds."""
    sites = {id(site): site for module in modules if (site := vars(module).get("_patch_site")) is not None}
    lifted = [(site, site.arounds) for site in sites.values()]
    try:
        for site, _ in lifted:
            site.arounds = []
        yield
    finally:
        for site, arounds in lifted:
            site.arounds = arounds


def underneath(module: nn.Module, *args, **kwargs):
    """The forward of a patched module, below all of its arounds."""
    return _call(module, len(module._patch_site.arounds), args, kwargs)


def _patched_forward(module: nn.Module, *args, **kwargs):
    return _call(module, 0, args, kwargs)


def _call(module: nn.Module, depth: int, args: tuple, kwargs: dict):
    site = module._patch_site
    if depth < len(site.arounds):
        return site.arounds[depth][2](functools.partial(_next, module, depth + 1), *args, **kwargs)
    if site.original is not None:
        return site.original(*args, **kwargs)
    return site.forward(module, *args, **kwargs)


def _next(module: nn.Module, depth: int, *args, **kwargs):
    return _call(module, depth, args, kwargs)
