from families import FAMILIES

from surroundings import Situation


def run(pipe, moved: int, **more):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5 - 0.4 * moved, b2=1.6 - 0.4 * moved)
    return FAMILIES["unet"].run(pipe, steps=6, **more)


SITUATION = Situation("FreeU", "unet", FAMILIES["unet"].pipe, run)
