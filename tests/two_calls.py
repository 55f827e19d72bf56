"""Guidance in one batch, or in two calls of the model with the conditional one first."""
from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES


class Sampler:
    """A pipeline of a few lines over a small DiT or CogVideoX, which gives its last latent."""

    def __init__(self, name: str, calls: int):
        pipe = FAMILIES[name].pipe()
        self.name, self.transformer, self.scheduler, self.calls = name, pipe.transformer, pipe.scheduler, calls
        self.do_classifier_free_guidance = calls == 1

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        x, t = x.repeat(len(conditions), *[1] * (x.ndim - 1)), t.expand(len(conditions))
        given: dict[str, Any] = {"timestep": t}
        given["class_labels" if self.name == "dit" else "encoder_hidden_states"] = conditions
        return self.transformer(x, **given).sample

    def __call__(self, steps: int = 12) -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        shape = (1, 4, 16, 16) if self.name == "dit" else (1, 3, 4, 8, 12)
        x, texts = torch.randn(shape, generator=random), torch.randn(2, 1, 5, 16, generator=random)
        cond, null = torch.tensor([[3], [1000]]) if self.name == "dit" else texts
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            if self.calls == 2:
                yes, no = self.predict(x, t, cond), self.predict(x, t, null)
            elif self.name == "dit":                               # which puts the conditional half first
                yes, no = self.predict(x, t, torch.cat([cond, null])).chunk(2)
            else:
                no, yes = self.predict(x, t, torch.cat([null, cond])).chunk(2)
            x = self.scheduler.step(no + 3 * (yes - no), t, x, return_dict=False)[0]
        return x


def both(method: Any, config: Any, name: str, steps: int = 12) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """The latent and the report of a patched run with guidance in one batch, and of one in two calls."""
    found = []
    for calls in (1, 2):
        sampler = Sampler(name, calls)
        with method.apply(sampler, config) as patch:
            found.append((sampler(steps), patch.report()))
    return found
