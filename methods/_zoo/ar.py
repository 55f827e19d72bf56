"""Digits from an autoregressive model: Chameleon over 8x8 tokens of a small VQ tokenizer, whose decoder is ours."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DIGITS, BEGIN, FIRST = 4, 14, 15             # ids: ten digits from 4 on, the begin of an image, image tokens from 15 on
COLUMNS, CODES, DEPTH = 8, 128, 8            # image tokens in a row, codes of the tokenizer, channels of a code


class Decoder(nn.Sequential):
    """Codes (B, 8, 8, 8), channels first -> images (B, 1, 32, 32) in about [-1, 1]. The library's tokenizer has no decoder."""

    def __init__(self, width: int = 48):
        def up(c_in: int, c_out: int) -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(c_in, c_out, 3, padding=1), nn.SiLU(),
                    nn.Conv2d(c_out, c_out, 3, padding=1), nn.SiLU()]
        super().__init__(nn.Conv2d(DEPTH, 2 * width, 3, padding=1), nn.SiLU(), *up(2 * width, width), *up(width, width),
                         nn.Conv2d(width, 1, 3, padding=1))


def build(layers: int = 6, width: int = 128) -> nn.ModuleDict:
    """The model with its tokenizer, and the decoder, untrained."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    names = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3, **{str(c): DIGITS + c for c in range(10)}, "<boi>": BEGIN}
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")                   # the class spells a code's number in letters
    names |= {f"IMGIMG{str(code).translate(letters)}Z": FIRST + code for code in range(CODES)}
    vq = ChameleonVQVAEConfig(embed_dim=DEPTH, num_embeddings=CODES, latent_channels=DEPTH, resolution=32, in_channels=1,
                              base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=1)
    config = ChameleonConfig(vocab_size=FIRST + CODES, hidden_size=width, intermediate_size=352, num_hidden_layers=layers,
                             num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
                             vocabulary_map=names, vq_config=vq, pad_token_id=0)
    return nn.ModuleDict({"model": ChameleonForConditionalGeneration(config), "decoder": Decoder()})


@dataclass(frozen=True)
class DigitLM:
    """The autoregressive digit model: `generate(lm.model, lm.prompt([3, 8]), Config(**lm.config()))`, then `lm.decode`."""

    model: Any                                # ChameleonForConditionalGeneration
    decoder: Decoder
    columns: int = COLUMNS
    tokens: int = COLUMNS * COLUMNS

    def prompt(self, labels: Sequence[int]) -> Tensor:
        """Ids (B, 2) that ask for the digits `labels`: the digit, then the begin of an image."""
        return torch.tensor([[DIGITS + label, BEGIN] for label in labels])

    def config(self, **more: Any) -> dict[str, Any]:
        """What a decoder method has to know of this model, and `more`."""
        return {"tokens": self.tokens, "columns": self.columns, "guidance": 2.0, **more}

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Generated ids (B, 64) -> images (B, 1, 32, 32) in [0, 1]."""
        codes = self.model.model.vqmodel.quantize.embedding(tokens - FIRST)
        images = self.decoder(codes.unflatten(1, (self.columns, self.columns)).permute(0, 3, 1, 2))
        return (images / 2 + 0.5).clamp(0, 1)
