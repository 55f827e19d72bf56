from families import FAMILIES

from surroundings import Situation


def make():
    pipe = FAMILIES["unet"].pipe()
    pipe.fuse_qkv_projections()
    return pipe


def run(pipe, moved: int, **more):
    """What moves is the text, of which fused projections make keys and values."""
    text = FAMILIES["unet"].call(more.get("batch", 1), moved)["prompt_embeds"]
    return FAMILIES["unet"].run(pipe, steps=6, **more, prompt_embeds=text)


SITUATION = Situation("Fused projections", "unet", make, run)
