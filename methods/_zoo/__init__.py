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
    """The weights of `name` in `model`, a module or a ModuleDict of several, ready to run."""
    from safetensors.torch import load_file
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(FOLDER / f"{name}.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("pos_embed.pos_embed")]          # a constant the class computes
    if unexpected or missing:
        raise RuntimeError(f"{name}.safetensors does not fit its card: missing {missing}, unexpected {unexpected}")
    return model.eval().requires_grad_(False)


def load_judge(name: str = "judge"):
    """A network that scores generated images: "judge" (digits), "video_judge" (digits in clips), "emoji_judge"."""
    from methods._zoo.emoji_judge import EmojiJudge
    from methods._zoo.judge import Judge
    return _load((EmojiJudge if name == "emoji_judge" else Judge)(**card(name)["config"]), name)


def _dit():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    from methods._zoo.pixel_vae import PixelVAE
    config = card("dit")["config"]
    model = _load(DiTTransformer2DModel(**config["transformer"]), "dit")
    names = {c: str(c) for c in range(10)}
    return DiTPipeline(model, PixelVAE(), DDIMScheduler(**config["scheduler"]), id2label=names)


def _unet():
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from torch.nn import ModuleDict
    from transformers import CLIPTextModel

    from methods._zoo.pixel_vae import PixelVAE
    from methods._zoo.text import clip_config, clip_tokenizer
    config = card("unet")["config"]
    parts = _load(ModuleDict({"unet": UNet2DConditionModel(**config["unet"]),
                              "text_encoder": CLIPTextModel(clip_config(**config["text"]))}), "unet")
    return StableDiffusionPipeline(PixelVAE(), parts["text_encoder"], clip_tokenizer(), parts["unet"],
                                   DDIMScheduler(**config["scheduler"]), None, None, requires_safety_checker=False)


def _mmdit():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from torch.nn import ModuleDict
    from transformers import CLIPTextModelWithProjection

    from methods._zoo.pixel_vae import PixelVAE
    from methods._zoo.text import clip_config, clip_tokenizer
    config = card("mmdit")["config"]
    parts = _load(ModuleDict({"transformer": SD3Transformer2DModel(**config["transformer"]), **{
        name: CLIPTextModelWithProjection(clip_config(**config["text"])) for name in ("text_encoder", "text_encoder_2")}}),
        "mmdit")
    return StableDiffusion3Pipeline(parts["transformer"], FlowMatchEulerDiscreteScheduler(**config["scheduler"]), PixelVAE(),
                                    parts["text_encoder"], clip_tokenizer(), parts["text_encoder_2"], clip_tokenizer(),
                                    None, None)


def _video_dit():
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from torch.nn import ModuleDict
    from transformers import T5EncoderModel

    from methods._zoo.pixel_vae import PixelVAE
    from methods._zoo.text import t5_config, t5_tokenizer
    config = card("video_dit")["config"]
    parts = _load(ModuleDict({"transformer": CogVideoXTransformer3DModel(**config["transformer"]),
                              "text_encoder": T5EncoderModel(t5_config(**config["text"]))}), "video_dit")
    return CogVideoXPipeline(t5_tokenizer(), parts["text_encoder"], PixelVAE(latent_channels=1), parts["transformer"],
                             CogVideoXDDIMScheduler(**config["scheduler"]))


def _ar():
    from methods._zoo.ar import DigitLM, build
    parts = _load(build(**card("ar")["config"]), "ar")
    return DigitLM(parts["model"], parts["decoder"])


MODELS = {"dit": _dit, "unet": _unet, "mmdit": _mmdit, "video_dit": _video_dit, "ar": _ar}


def tiny(name: str):
    """A small model trained on real images, in an unmodified pipeline of its library.

    Args:
        name: "dit" (`DiTPipeline`, digits by class), "unet" (`StableDiffusionPipeline`, emoji by name), "mmdit"
            (`StableDiffusion3Pipeline`, emoji by name), "video_dit" (`CogVideoXPipeline`, digits that move, from prompts such
            as "seven moving left") or "ar" (`DigitLM`, a Chameleon with its image decoder, digits by class). All 32x32.

    Raises:
        ValueError: no model of that name; the message lists those there are.
    """
    if name not in MODELS:
        raise ValueError(f"no tiny model {name!r}; there are: {', '.join(MODELS)}")
    return MODELS[name]()
