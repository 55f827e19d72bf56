"""Words for the small text-conditional models.

The emoji models read through a CLIP tokenizer whose 2,048 tokens were learnt from the names of emoji, the video model
through a T5 tokenizer that knows the words of its prompts.
"""
from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = Path(__file__).with_name("emoji_vocabulary.json")
LONGEST = 16                          # tokens of a prompt, its start and end included; the longest name takes 13
SHORT = 8                             # tokens of a video prompt, its end and padding included
VIDEO_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
               "moving", "left", "right", "up", "down")


def clip_tokenizer():
    """A `CLIPTokenizer` over `emoji_vocabulary.json`."""
    from transformers import CLIPTokenizer
    learnt = json.loads(VOCABULARY.read_text())
    vocab = {piece: number for number, piece in enumerate(learnt["vocab"])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in learnt["merges"]], model_max_length=LONGEST)


def clip_config(**sizes):
    """The configuration of a small CLIP text encoder that reads the ids of `clip_tokenizer()`."""
    from transformers import CLIPTextConfig
    tokens = clip_tokenizer()
    return CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=LONGEST, bos_token_id=tokens.bos_token_id,
                          eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id, **sizes)


def t5_tokenizer():
    """A `T5Tokenizer` over the fifteen words of the video prompts."""
    from transformers import T5Tokenizer
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in VIDEO_WORDS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=226)


def t5_config(**sizes):
    """The configuration of a small T5 encoder that reads the ids of `t5_tokenizer()`."""
    from transformers import T5Config
    return T5Config(vocab_size=len(t5_tokenizer()), dropout_rate=0.0, **sizes)
