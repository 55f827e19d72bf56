"""Small models this repository trained on real images, ready to run: `methods.tiny("dit")`.

Each is `<name>.safetensors` (fp16) beside a card `<name>.json` that says how it was made and what it scores.
"""
from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def card(name: str) -> dict:
    """The card of one model: configuration, data, command, seed, hash and metrics."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def _load(model, name: str):
    from safetensors.torch import load_file
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(FOLDER / f"{name}.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"pos_embed.pos_embed"}:
        raise RuntimeError(f"{name}.safetensors does not fit its card: missing {missing}, unexpected {unexpected}")
    return model.eval().requires_grad_(False)


def load_judge():
    """The digit classifier that scores generated images."""
    from methods._zoo.judge import Judge
    return _load(Judge(), "judge")


def _dit():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    from methods._zoo.pixel_vae import PixelVAE
    config = card("dit")["config"]
    model = _load(DiTTransformer2DModel(**config["transformer"]), "dit")
    names = {c: str(c) for c in range(10)}
    return DiTPipeline(model, PixelVAE(), DDIMScheduler(**config["scheduler"]), id2label=names)


MODELS = {"dit": _dit}


def tiny(name: str):
    """A ready, unmodified pipeline over a small trained model. `name`: "dit" (class-conditional digits, 32x32).

    Raises:
        ValueError: no model of that name; the message lists those there are.
    """
    if name not in MODELS:
        raise ValueError(f"no tiny model {name!r}; there are: {', '.join(MODELS)}")
    return MODELS[name]()
