"""Digits that move, from prompts such as "seven moving left": a joint text and video transformer (CogVideoX).

It attends over all frames at once. It learns first from single frames, then from clips; Muon and small batches get it there
several times sooner than AdamW and large ones.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from accel_tools.zoo import digits
from accel_tools.zoo.training import CHECKPOINTS, SCHEDULER, Run, Trained, device, train, zero
from methods._core.noise import Noising
from methods._zoo import text

TRANSFORMER = dict(num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, time_embed_dim=128,
                   text_embed_dim=64, num_layers=6, sample_width=32, sample_height=32, sample_frames=digits.FRAMES,
                   patch_size=4, temporal_compression_ratio=1, max_text_seq_length=text.SHORT,
                   use_rotary_positional_embeddings=True)
TEXT = dict(d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
DDIM = SCHEDULER | {"snr_shift_scale": 3.0}             # eight frames that agree tell more through the noise than one
LENGTHS = ((text.SHORT, 0.9), (226, 0.1))       # to which prompts are padded; the pipeline's default is 226
SCANS = 5                                       # of each digit


def models(layers: int = TRANSFORMER["num_layers"]) -> nn.ModuleDict:
    from diffusers import CogVideoXTransformer3DModel
    from transformers import T5EncoderModel
    transformer = CogVideoXTransformer3DModel(**TRANSFORMER | {"num_layers": layers})
    for block in transformer.transformer_blocks:                           # start as the identity, the output at zero
        zero(block.norm1.linear, block.norm2.linear)
    zero(transformer.norm_out.linear, transformer.proj_out)
    return nn.ModuleDict({"transformer": transformer, "text_encoder": T5EncoderModel(text.t5_config(**TEXT))})


def scans() -> tuple[Tensor, Tensor]:
    """The first `SCANS` training images of each digit: few enough to be learnt well in half an hour of one core."""
    x, y = digits.split(held_out=False)
    few = torch.cat([(y == digit).nonzero()[:SCANS, 0] for digit in range(10)])
    return x[few], y[few]


def rotary(frames: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all places of a clip of `frames` frames."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    grid = TRANSFORMER["sample_width"] // TRANSFORMER["patch_size"]
    return get_3d_rotary_pos_embed(TRANSFORMER["attention_head_dim"], ((0, 0), (grid, grid)), (grid, grid), frames)


def loss_on(frames: int, size: int) -> Callable[[Run], Tensor]:
    """Mean squared error of v on `size` clips of `frames` frames at stratified noise levels; one prompt in ten is dropped."""
    from diffusers import CogVideoXDDIMScheduler
    noising = Noising(CogVideoXDDIMScheduler(**DDIM))
    x, y = scans()
    tokenizer, (lengths, chances) = text.t5_tokenizer(), zip(*LENGTHS, strict=True)
    asked = [*digits.prompts(), ""]
    ids = {n: tokenizer(asked, padding="max_length", max_length=n, return_tensors="pt").input_ids for n in lengths}
    positions = tuple(part.to(device()) for part in rotary(frames))

    def loss(run: Run) -> Tensor:
        index = torch.randint(len(x), (size,), generator=run.random)
        direction = torch.randint(len(digits.DIRECTIONS), (size,), generator=run.random)
        start = int(torch.randint(digits.FRAMES - frames + 1, (), generator=run.random))
        x0 = digits.moving(x[index], direction)[:, start:start + frames]
        dropped = torch.rand(size, generator=run.random) < 0.1
        prompt = torch.where(dropped, len(asked) - 1, y[index] * len(digits.DIRECTIONS) + direction)
        length = lengths[int(torch.multinomial(torch.tensor(chances), 1, generator=run.random))]
        noisy = noising.sample(x0.to(device()), run.random)
        with torch.autocast(device().type, dtype=torch.bfloat16):
            words = run.model["text_encoder"](ids[length][prompt].to(device())).last_hidden_state
            v = run.model["transformer"](noisy.x, words, noisy.t, image_rotary_emb=positions).sample
        return noising.loss(v, noisy)
    return loss


def train_video(seed: int, scale: float) -> Trained:
    torch.manual_seed(seed)
    first = Run(models().to(device()), steps=round(2400 * scale), lr=1.5e-3, matrices=8e-3, average=0.998, seed=seed)
    train(first, loss_on(1, 16), CHECKPOINTS / "video_dit-still.ckpt")
    model = models().to(device())
    model.load_state_dict(first.averaged.state_dict())
    run = Run(model, steps=round(3300 * scale), lr=1.5e-3, matrices=8e-3, average=0.998, seed=seed + 1)
    train(run, loss_on(digits.FRAMES, 3), CHECKPOINTS / "video_dit.ckpt")
    return Trained(run.after(first), {"transformer": TRANSFORMER, "text": TEXT, "scheduler": DDIM}, batch=3, family="cogvideox",
                   data=f"npm {digits.PACKAGE}: {SCANS} training images of each digit, shrunk to 16x16 and moved over 8 frames "
                        f"of 32x32 by two pixels a frame; first {first.steps} steps of 16 single frames, then {run.steps} "
                        "steps of 3 clips")
