from families import FAMILIES

from surroundings import Situation


def make():
    pipe = FAMILIES["unet"].pipe()
    pipe.fuse_qkv_projections()
    return pipe


SITUATION = Situation("Fused projections", "unet", make, lambda pipe, moved, **more: FAMILIES["unet"].run(
    pipe, steps=6, **more, guidance=3.0 + moved))
