"""What the bench asks of each bundled model and how the answers are scored. No other tool names a model.

    task = TASKS["dit"]
    pipe = task.load()
    images = task.sample(pipe, task.steps, task.prompts(10))
    task.quality(images, task.prompts(10))["label_accuracy"]
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import methods
from accel_tools.measure import quality
from accel_tools.measure.arms import Arm, batches, sample_batch
from accel_tools.zoo import digits
from methods._zoo import MODELS, card, text


@dataclass(frozen=True)
class Task(ABC):
    """One bundled model, what it draws in words, and how it is run where nothing else is said.

    `steps` of the sampler and `curve`, the fewer steps it is also measured with; `batch` of a set of images and `timed`,
    the number of images in a run that is timed; `score` is the key of its quality that a table leads with.
    """

    model: str
    title: str
    steps: int | None = 20
    guidance: float = 2.0
    batch: int = 50
    timed: int = 2
    curve: tuple[int, ...] = (15, 10, 7, 5)
    score: str = "label_accuracy"
    kinds: tuple[str, ...] = ("patch",)           # of method that can work on it
    settings: tuple[tuple[str, Any], ...] = ()    # of the pipeline's call; text lengths, whose defaults suit large models
    paired = True                                 # an accelerated image resembles the plain one of its seed
    no_fewer_steps = ""                           # why there is no run with fewer steps, where there is none

    def load(self) -> Any:
        """The model, unmodified."""
        return methods.tiny(self.model)

    def plain(self, method: str | None = None) -> Arm:
        """The unaccelerated arm that `method` is compared with."""
        return Arm(self.steps)

    @abstractmethod
    def prompts(self, n: int, first: int = 0) -> list[Any]:
        """The `n` prompts from number `first` on of an endless series."""

    @abstractmethod
    def quality(self, images: Tensor, prompts: Sequence[Any]) -> dict[str, Any]:
        """The judge's verdict: `n`, `frechet`, `recall` by class, and shares of its own."""

    @abstractmethod
    def real_frechet(self, n: int) -> dict[str, Any]:
        """{frechet, n}: the distance of real images to other real ones."""

    def draw(self, pipe: Any, steps: int | None, prompts: Sequence[Any], *, seed: int, first: int, guidance: float) -> Tensor:
        """One batch of a set, in which it begins at number `first`; depends on nothing drawn before it."""
        return sample_batch(pipe, steps, prompts, seed=seed, first=first, guidance=guidance, **dict(self.settings))

    def sample(self, pipe: Any, steps: int | None, prompts: Sequence[Any], *, seed: int = 0, guidance: float | None = None,
               batch: int | None = None) -> Tensor:
        """Images (n, C, H, W) or clips (n, F, C, H, W) in [0, 1]; equal seed, prompts and batch start from equal noise."""
        guidance = self.guidance if guidance is None else guidance
        return torch.cat([self.draw(pipe, steps, prompts[part], seed=seed, first=part.start, guidance=guidance)
                          for part in batches(len(prompts), batch or self.batch)])


class DigitImages(Task):
    """Handwritten digits by class number."""

    def prompts(self, n, first=0):
        return [(first + i) % 10 for i in range(n)]

    def quality(self, images, prompts):
        found = quality.quality(images, torch.tensor(prompts))
        return found | {"recall": named(found["recall"], range(10))}

    def real_frechet(self, n):
        return quality.real_frechet(n)


class EmojiImages(Task):
    """Emoji by name."""

    def prompts(self, n, first=0):
        return cycled(card("emoji_judge")["names"], n, first)

    def quality(self, images, prompts):
        found = quality.emoji_quality(images, prompts)
        return found | {"recall": named(found["recall"], quality.emoji_groups())}

    def real_frechet(self, n):
        return quality.real_emoji_frechet(n)


class DigitClips(Task):
    """Digits that move, by a phrase such as "seven moving left"."""

    def prompts(self, n, first=0):
        return cycled(digits.prompts(), n, first)

    def quality(self, images, prompts):
        found = quality.clip_quality(images, torch.tensor([digits.WORDS.index(prompt.split()[0]) for prompt in prompts]))
        return found | {"recall": named(found["recall"], range(10))}

    def real_frechet(self, n):
        return quality.real_frechet_of_card("video_judge")


class DigitTokens(DigitImages):
    """Handwritten digits by class number, token by token; the plain run is the method's own with OFF, one pass a token."""

    paired = False
    no_fewer_steps = "each token takes one pass; there are no steps to leave out"

    def load(self):
        return TokenModel(super().load())

    def plain(self, method=None):
        module = import_module(f"methods.{method}")
        default = module.Config()
        off = {field.name: getattr(module.OFF, field.name) for field in fields(module.OFF)}
        return Arm(None, method, {name: value for name, value in off.items() if value != getattr(default, name)})

    def draw(self, pipe, steps, prompts, *, seed, first, guidance):
        return pipe.generate(prompts, seed=seed + 1_000_003 * first, guidance=guidance)


class TokenModel:
    """An autoregressive image model, and the decoder it runs under while `decoding` is entered."""

    def __init__(self, tiny: Any):
        self.tiny = tiny
        self._decoder: tuple[ModuleType, dict[str, Any]] | None = None
        self._passes = self._tokens = 0

    @contextmanager
    def decoding(self, module: ModuleType, config: dict[str, Any]) -> Iterator[TokenModel]:
        """Decode by `module.generate` with the settings of this model and `config`."""
        module.Config(**self.tiny.config(**config))                                # refuses what it cannot run now
        self._decoder, self._passes, self._tokens = (module, config), 0, 0
        try:
            yield self
        finally:
            self._decoder = None

    def report(self) -> dict[str, Any]:
        """What the decoder did since it was entered: passes through the model and the tokens they gave to each image."""
        module, config = self._decoder
        off = module.Config(**config) == module.OFF
        return {"method": module.__name__.rpartition(".")[2], "state": "off" if off else "engaged",
                "passes": self._passes, "tokens": self._tokens}

    @torch.no_grad()
    def generate(self, labels: Sequence[int], *, seed: int, guidance: float) -> Tensor:
        """Images (n, 1, H, W) in [0, 1]. Raises RuntimeError outside of `decoding`."""
        if self._decoder is None:
            raise RuntimeError("a token model runs under a decoder: with model.decoding(sjd, {}): ...")
        module, config = self._decoder
        config = module.Config(**self.tiny.config(**{"guidance": guidance, "seed": seed} | config))
        decoded = module.generate(self.tiny.model, self.tiny.prompt(labels), config)
        self._passes += decoded.report["forwards"]
        self._tokens += decoded.report["tokens"]
        return self.tiny.decode(decoded.tokens)


def named(shares: Sequence[float | None], names: Sequence[Any]) -> dict[str, float]:
    """Shares by the name of their class, those of classes nobody asked for left out."""
    return {str(name): share for name, share in zip(names, shares, strict=True) if share is not None}


def cycled(every: Sequence[str], n: int, first: int) -> list[str]:
    """`n` of the prompts from number `first` on, in a fixed shuffled order that begins anew at its end."""
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    return [every[order[i % len(order)]] for i in range(first, first + n)]


TASKS: dict[str, Task] = {
    "dit": DigitImages("dit", "Digits from a diffusion transformer"),
    "unet": EmojiImages("unet", "Emoji from a UNet", guidance=3.0, score="retrieval"),
    "mmdit": EmojiImages("mmdit", "Emoji from a two-stream transformer", guidance=3.0, score="retrieval",
                         settings=(("max_sequence_length", 1),)),
    "video_dit": DigitClips("video_dit", "Moving digits from a video transformer", guidance=3.0, batch=10,
                            settings=(("max_sequence_length", text.SHORT),)),
    "ar": DigitTokens("ar", "Digits token by token", steps=None, curve=(), kinds=("decoder",)),
}


def bundled() -> list[str]:
    """The models with a task that are in the zoo."""
    return [model for model in TASKS if model in MODELS]
