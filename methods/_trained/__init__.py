"""What methods learnt on the bundled models: `<name>.safetensors` (fp16) beside a card `<name>.json` of how and how well."""
from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def weights(name: str) -> Path:
    """The file of trained weights called `name`, such as "dydit-50".

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    if name not in known:
        raise ValueError(f"no trained weights {name!r}; there are: {', '.join(known) or 'none'}")
    return FOLDER / f"{name}.safetensors"


def weights_card(name: str) -> dict:
    """The card of trained weights: data, command, seed, hash and metrics."""
    return json.loads(weights(name).with_suffix(".json").read_text())
