import torch
from diffusers import Cosmos2TextToImagePipeline, CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler

from families.making import WIDTH, Family, both, wan_vae


class _Safe(torch.nn.Module):
    """Passes everything."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, *_) -> bool:
        return True

    def check_video_safety(self, video):
        return video


def make(layers: int = 3) -> Cosmos2TextToImagePipeline:
    model = CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=layers, mlp_ratio=2,
        text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False, extra_pos_embed_type="learnable")
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return Cosmos2TextToImagePipeline(None, None, model, wan_vae(), scheduler, _Safe())


FAMILY = Family("cosmos", make, ((64, 96), (64, 64)), both)
