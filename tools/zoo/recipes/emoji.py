"""Emoji from their names: a UNet that predicts v, and a two-stream transformer (SD3) that predicts the flow.

Both learn their text encoder along the way, first at 16x16, where the shapes are and a step is cheap, then at 32x32.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel_tools.zoo import emoji
from accel_tools.zoo.training import (
    CHECKPOINTS,
    SCHEDULER,
    Run,
    Trained,
    carry,
    conditional,
    device,
    position_embedding,
    train,
    zero,
)
from methods._core.noise import Noising, stratified
from methods._zoo import text

DDIM = SCHEDULER | {"steps_offset": 1}                          # or the pipeline warns
UNET = dict(sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 64, 128), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=128, attention_head_dim=(1, 2, 4), norm_num_groups=16)
UNET_TEXT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)


def learn_vocabulary() -> None:
    """Byte pairs of the names, 2,048 tokens with the two special ones -> methods/_zoo/emoji_vocabulary.json."""
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer().train_new_from_iterator(emoji.load(emoji.GROUPS).names, vocab_size=2048, show_progress=False)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    text.VOCABULARY.write_text(json.dumps({"vocab": sorted(model["vocab"], key=model["vocab"].get),
                                           "merges": [" ".join(pair) for pair in model["merges"]]}, ensure_ascii=False))


def prompts_and_pictures(groups: Sequence[str] = emoji.DRAWN) -> tuple[Tensor, Tensor]:
    """Ids (N + 1, 16) of all names, the empty prompt last; pictures (N, 3, 32, 32)."""
    data = emoji.load(groups)
    ids = text.clip_tokenizer()([*data.names, ""], padding="max_length", return_tensors="pt").input_ids
    return ids, data.images


def unet_of(size: int) -> nn.ModuleDict:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel
    return nn.ModuleDict({"unet": UNet2DConditionModel(**UNET | {"sample_size": size}),
                          "text_encoder": CLIPTextModel(text.clip_config(**UNET_TEXT))})


def v_loss(ids: Tensor, pictures: Tensor, size: int) -> Callable[[Run], Tensor]:
    """Mean squared error of v at stratified noise levels; one prompt in ten is dropped."""
    from diffusers import DDIMScheduler
    noising = Noising(DDIMScheduler(**DDIM))

    def loss_of(run: Run) -> Tensor:
        x0, prompt = conditional(run, pictures, ids, size)
        noisy = noising.sample(x0.to(device()), run.random)
        with torch.autocast(device().type, dtype=torch.bfloat16):
            words = run.model["text_encoder"](prompt.to(device())).last_hidden_state
            v = run.model["unet"](noisy.x, noisy.t, words).sample
        return noising.loss(v, noisy)
    return loss_of


def train_unet(seed: int, scale: float) -> Trained:
    """Two stages at 16x16, all six groups and then the three that are asked for, and these at 32x32."""
    torch.manual_seed(seed)
    ids, pictures = prompts_and_pictures(emoji.GROUPS)
    six = Run(unet_of(16).to(device()), steps=round(3000 * scale), lr=1.2e-3, average=0.999, seed=seed)
    train(six, v_loss(ids, F.avg_pool2d(pictures, 2), 32), CHECKPOINTS / "unet-six.ckpt")
    ids, pictures = prompts_and_pictures()
    three = Run(six.averaged.requires_grad_(True), steps=round(2200 * scale), lr=1.5e-3, average=0.999, seed=seed + 1)
    train(three, v_loss(ids, F.avg_pool2d(pictures, 2), 32), CHECKPOINTS / "unet-three.ckpt")
    model = unet_of(32).to(device())
    model.load_state_dict(three.averaged.state_dict())
    run = Run(model, steps=round(800 * scale), lr=8e-4, average=0.998, seed=seed + 2)
    train(run, v_loss(ids, pictures, 16), CHECKPOINTS / "unet.ckpt")
    return Trained(run.after(three.after(six)), {"unet": UNET, "text": UNET_TEXT, "scheduler": DDIM}, batch=16, family="unet",
                   data=f"npm {emoji.PACKAGE}, names as prompts: {six.steps} steps of 32 at 16x16 on six groups, {three.steps} "
                        f"more on the {len(pictures)} pictures of three, then {run.steps} steps of 16 at 32x32")


# ---- the two-stream transformer ----------------------------------------------------------------------------------------

MMDIT = dict(sample_size=32, patch_size=2, in_channels=3, out_channels=3, num_layers=5, attention_head_dim=32,
             num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128,
             pos_embed_max_size=16, qk_norm="rms_norm")
MMDIT_TEXT = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, projection_dim=64)
FLOW = dict(shift=1.0)
EMPTY = ((1, 0.8), (16, 0.15), (256, 0.05))       # lengths of the missing third text encoder's zeros, and how often they occur


def mmdit_of(size: int) -> nn.ModuleDict:
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection
    grid = size // MMDIT["patch_size"]
    transformer = SD3Transformer2DModel(**MMDIT | {"sample_size": size, "pos_embed_max_size": grid})
    for block in transformer.transformer_blocks:                           # start as the identity, the output at zero
        zero(block.norm1.linear, block.norm1_context.linear)
    zero(transformer.norm_out.linear, transformer.proj_out)
    width = MMDIT["attention_head_dim"] * MMDIT["num_attention_heads"]
    transformer.pos_embed.pos_embed = position_embedding(grid, MMDIT["pos_embed_max_size"], width)
    texts = [CLIPTextModelWithProjection(text.clip_config(**MMDIT_TEXT)) for _ in range(2)]
    return nn.ModuleDict({"transformer": transformer, "text_encoder": texts[0], "text_encoder_2": texts[1]})


def flow_loss(ids: Tensor, pictures: Tensor, size: int) -> Callable[[Run], Tensor]:
    """Mean squared error of the flow noise - x at logit-normal, stratified times; one prompt in ten is dropped."""
    lengths, chances = zip(*EMPTY, strict=True)

    def loss_of(run: Run) -> Tensor:
        x0, prompt = conditional(run, pictures, ids, size)
        sigma = torch.special.ndtri(stratified(size, run.random).clamp(1e-4, 1 - 1e-4)).sigmoid()
        noise = torch.randn(x0.shape, generator=run.random)
        s = sigma.view(-1, 1, 1, 1)
        empty = lengths[int(torch.multinomial(torch.tensor(chances), 1, generator=run.random))]
        prompt, noisy, t = prompt.to(device()), ((1 - s) * x0 + s * noise).to(device()), (sigma * 1000).to(device())
        with torch.autocast(device().type, dtype=torch.bfloat16):
            both = [run.model[name](prompt, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
            words = torch.cat([each.hidden_states[-2] for each in both], -1)
            words = torch.cat([words, words.new_zeros(size, empty, words.shape[-1])], 1)
            flow = run.model["transformer"](noisy, words, torch.cat([each.text_embeds for each in both], -1), t).sample
        return F.mse_loss(flow.float(), (noise - x0).to(device()))
    return loss_of


def train_mmdit(seed: int, scale: float) -> Trained:
    ids, pictures = prompts_and_pictures()
    torch.manual_seed(seed)
    first = Run(mmdit_of(16).to(device()), steps=round(1200 * scale), lr=1.5e-3, average=0.999, seed=seed)
    train(first, flow_loss(ids, F.avg_pool2d(pictures, 2), 48), CHECKPOINTS / "mmdit-16.ckpt")
    torch.manual_seed(seed)
    model = mmdit_of(32).to(device())
    carry(first.averaged, model)
    run = Run(model, steps=round(1600 * scale), lr=8e-4, average=0.999, seed=seed + 1)
    train(run, flow_loss(ids, pictures, 24), CHECKPOINTS / "mmdit.ckpt")
    return Trained(run.after(first), {"transformer": MMDIT, "text": MMDIT_TEXT, "scheduler": FLOW}, batch=24, family="sd3",
                   data=f"npm {emoji.PACKAGE}, names as prompts, {len(pictures)} pictures of three groups: first {first.steps} "
                        f"steps of 48 at 16x16, then {run.steps} steps of 24 at 32x32")
