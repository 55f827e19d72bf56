from diffusers import StableDiffusionPAGPipeline
from families import FAMILIES

from surroundings import Situation


def make() -> StableDiffusionPAGPipeline:
    pipe = StableDiffusionPAGPipeline(**FAMILIES["unet"].pipe().components, requires_safety_checker=False,
                                      pag_applied_layers=["mid", "up"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


SITUATION = Situation("Perturbed attention guidance", "unet", make, lambda pipe, moved, **more: FAMILIES["unet"].run(
    pipe, steps=6, **more, pag_scale=1.0 + 2 * moved))
