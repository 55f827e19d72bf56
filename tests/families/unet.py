from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel

from families.making import WIDTH, Family, both, ddim, vae


def make(layers: int = 2) -> StableDiffusionPipeline:
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32, 64), layers_per_block=layers, cross_attention_dim=WIDTH,
        attention_head_dim=8, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2)
    return StableDiffusionPipeline(vae(), None, None, model, ddim(), None, None, requires_safety_checker=False)


FAMILY = Family("unet", make, ((32, 32), (32, 48)), both, image_to_image=StableDiffusionImg2ImgPipeline)
