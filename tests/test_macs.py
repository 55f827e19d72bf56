"""MAC counts of one block of every model family against their closed forms, as it is and under methods."""
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, WORDS

from accel_tools.measure.macs import count_macs, equal_cost_steps
from methods import fora, tome
from methods._core.denoiser import describe

C = 32                       # width of the blocks under test


def linear(tokens: int, share: float = 1.0) -> int:
    """`share` times one C x C layer."""
    return int(share * tokens * C * C)


def attention(queries: int, keys: int) -> int:
    """The two products of an attention map, its projections apart."""
    return 2 * queries * keys * C


@dataclass
class Form:
    """MACs of one block for one sample of `n` image tokens: `mixing(n)` the self-attention, `other(n)` what else caches may
    leave out, `kept` the modulation, which they do not. Norms, activations and gates count nothing."""

    mixing: Callable[[int], int]
    other: Callable[[int], int]
    kept: int = 0


def image_attention(n):
    return linear(n, 4) + attention(n, n)                           # q, k, v, out


def joint_attention(n):
    return image_attention(n + WORDS)                               # text and image have their own weights of one size


def cross(n, text_width):
    return linear(n, 2) + 2 * WORDS * text_width * C + attention(n, WORDS)


FORMS = {
    "unet": Form(image_attention, lambda n: cross(n, 16) + linear(n, 12)),                     # GEGLU: 8 in, 4 out
    "dit": Form(image_attention, lambda n: linear(n, 8), linear(1, 6) + 256 * C + linear(1)),   # its own timestep MLP
    "pixart": Form(image_attention, lambda n: cross(n, C) + linear(n, 8)),
    "sd3": Form(joint_attention, lambda n: linear(n + WORDS, 8), linear(1, 12)),               # modulates two streams
    "flux": Form(joint_attention, lambda n: linear(n + WORDS, 8), linear(1, 12)),
    "flux-single": Form(lambda n: linear(n + WORDS, 3) + attention(n + WORDS, n + WORDS),       # no out projection
                        lambda n: linear(n + WORDS, 4 + 5), linear(1, 3)),                      # MLP in; joined out
    "latte": Form(image_attention, lambda n: cross(n, C) + linear(n, 8)),
    "cogvideox": Form(joint_attention, lambda n: linear(n + WORDS, 8), 2 * 6 * 8 * C),         # from a time embedding of 8
}


def block_macs(name, patch=None, **run):
    """(MACs counted in a block on the last call of a run, its batch, its image tokens)."""
    family, _, single = name.partition("-")
    pipe = FAMILIES[family].pipe()
    target = pipe.unet if family == "unet" else pipe.transformer
    block = next(block for block in describe(target).blocks if (block.stream == "fused") == bool(single))
    calls = []
    hook = block.module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    applied = patch(pipe) if patch else None
    FAMILIES[family].run(pipe, steps=2, **run)
    hook.remove()
    args, kwargs = calls[-1]
    x = args[0] if args else kwargs["hidden_states"]
    assert x.shape[2] == C
    counted = count_macs(lambda: block.module(*args, **kwargs))
    if applied:
        applied.remove()
    return counted, *x.shape[:2]


@pytest.mark.parametrize("name", FORMS)
def test_plain_block(name):
    counted, batch, n = block_macs(name)
    form = FORMS[name]
    assert counted == batch * (form.mixing(n) + form.other(n) + form.kept)


@pytest.mark.parametrize("name", FORMS)
def test_merged_block(name):
    """Half the image tokens are merged away for the attention; matching a quarter with the rest is counted."""
    counted, batch, n = block_macs(name, lambda pipe: tome.apply(pipe, tome.Config(ratio=0.5)))
    form, matching = FORMS[name], (n - n // 4) * (n // 4) * C
    assert counted == batch * (form.mixing(n - n // 2) + matching + form.other(n) + form.kept)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "unet"])
def test_reused_block(name):
    counted, batch, _ = block_macs(name, lambda pipe: fora.apply(pipe, fora.Config(interval=2, count_from="start")))
    assert counted == batch * FORMS[name].kept


def test_fused_attention_counts_what_it_computes():
    q, k = torch.randn(2, 4, 48, 16), torch.randn(2, 4, 80, 16)
    assert count_macs(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k)) == 2 * 4 * 48 * 80 * 16 * 2


@pytest.mark.parametrize(("method", "plain", "steps", "expected"), [
    (1000, 2000, 20, 10), (1099, 2000, 20, 10), (1100, 2000, 20, 11), (1, 2000, 20, 1), (2000, 2000, 20, 20)])
def test_equal_cost_is_at_or_below(method, plain, steps, expected):
    assert equal_cost_steps(method, plain, steps) == expected
