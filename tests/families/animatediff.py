from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, UNet2DConditionModel

from families.making import WIDTH, Family, both, vae


def make(layers: int = 2) -> AnimateDiffPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32), layers_per_block=layers, sample_size=8, cross_attention_dim=WIDTH, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    motion = MotionAdapter(block_out_channels=(32, 32), motion_layers_per_block=layers, motion_norm_num_groups=8,
                           motion_num_attention_heads=4)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False)
    return AnimateDiffPipeline(vae(), None, None, unet, motion, scheduler)


FAMILY = Family("animatediff", make, ((32, 48), (48, 32)), lambda batch, seed: dict(**both(batch, seed), num_frames=4))
