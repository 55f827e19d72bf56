"""The tasks of the bundled models on untrained models of the same kind, small enough for a test."""
from __future__ import annotations

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from accel_tools.measure.tasks import TASKS, DigitClips, DigitImages, DigitTokens, EmojiImages, TokenModel
from methods._zoo.ar import DigitLM, build
from methods._zoo.pixel_vae import PixelVAE
from methods._zoo.text import clip_config, clip_tokenizer, t5_config, t5_tokenizer

TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


class Digits(DigitImages):
    def load(self):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=2,
                                      sample_size=32, patch_size=4, num_embeds_ada_norm=1000)
        return DiTPipeline(model.eval(), PixelVAE(), DDIMScheduler())

    def real_frechet(self, n):
        return {"frechet": 1.0, "n": n}


class Emoji(EmojiImages):
    def load(self):
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=8)
        return StableDiffusionPipeline(PixelVAE(), CLIPTextModel(clip_config(**TEXT)).eval(), clip_tokenizer(), model.eval(),
                                       DDIMScheduler(clip_sample=False), None, None, requires_safety_checker=False)


class JointEmoji(EmojiImages):
    def load(self):
        torch.manual_seed(0)
        model = SD3Transformer2DModel(sample_size=32, patch_size=4, in_channels=3, out_channels=3, num_layers=2,
                                      attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
                                      caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=8)
        texts = [CLIPTextModelWithProjection(clip_config(**TEXT, projection_dim=32)).eval() for _ in range(2)]
        return StableDiffusion3Pipeline(model.eval(), FlowMatchEulerDiscreteScheduler(), PixelVAE(), texts[0], clip_tokenizer(),
                                        texts[1], clip_tokenizer(), None, None)


class Clips(DigitClips):
    def load(self):
        torch.manual_seed(0)
        model = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1, time_embed_dim=16, text_embed_dim=16,
            num_layers=2, sample_width=32, sample_height=32, sample_frames=8, patch_size=8, temporal_compression_ratio=1,
            max_text_seq_length=8, use_rotary_positional_embeddings=True)
        text = T5EncoderModel(t5_config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()
        return CogVideoXPipeline(t5_tokenizer(), text, PixelVAE(latent_channels=1), model.eval(), CogVideoXDDIMScheduler())


class Tokens(DigitTokens):
    def load(self):
        torch.manual_seed(0)
        parts = build(layers=1, width=32).eval()
        return TokenModel(DigitLM(parts["model"], parts["decoder"]))

    def real_frechet(self, n):
        return {"frechet": 1.0, "n": n}


SMALL = dict(steps=4, timed=1, curve=(2, 1))
UNTRAINED = {
    "dit": Digits("dit", "untrained", **SMALL),
    "unet": Emoji("unet", "untrained", score="retrieval", **SMALL),
    "mmdit": JointEmoji("mmdit", "untrained", score="retrieval", **SMALL),
    "video_dit": Clips("video_dit", "untrained", **SMALL),
    "ar": Tokens("ar", "untrained", steps=None, timed=1, curve=(), kinds=TASKS["ar"].kinds),
}
