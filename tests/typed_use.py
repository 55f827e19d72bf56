"""What a user of the library writes, for the type checker alone (`make check`): nothing here is run."""
from typing import Any, assert_type

import torch

import methods
from accel_kernels.merge import Segments, merge, segments
from methods import fora, sjd
from methods._core.patch import Patch


def a_patch_is_known_by_its_type(pipe: Any) -> None:
    patch = fora.apply(pipe, fora.Config(interval=2))
    assert_type(patch, Patch)
    assert_type(patch.report(), dict[str, Any])
    assert_type(fora.computes(0, 4, 2), bool)
    patch.remove()


def a_config_is_checked(pipe: Any) -> None:
    fora.Config(intervall=2)                                     # type: ignore[call-arg]
    fora.Config(interval="two")                                  # type: ignore[arg-type]
    fora.Config(2)                                               # type: ignore[call-arg]
    fora.OFF.interval = 3                                        # type: ignore[misc]
    fora.apply(pipe, sjd.Config())                               # type: ignore[arg-type]
    methods.tiny(3)                                              # type: ignore[arg-type]


def a_decoder_gives_tokens(model: Any, prompt: torch.Tensor) -> None:
    assert_type(sjd.generate(model, prompt, sjd.Config()), sjd.Decoded)


def an_op_says_what_it_takes(x: torch.Tensor) -> None:
    plan = segments(torch.zeros(1, 4, dtype=torch.long), 2)
    assert_type(plan, Segments)
    assert_type(merge(x, plan), torch.Tensor)
    merge(x, 2)                                                  # type: ignore[arg-type]
