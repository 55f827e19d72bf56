import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

import methods
from methods import fora, tome
from methods._core.check import STATES, patches

FLUX, SDXL = FAMILIES["flux"], FAMILIES["sdxl"]


def test_all_patches_are_tried_and_nothing_else():
    assert {method.__name__ for method in patches()} == {method.__name__ for method in contract.patches()}


def test_what_refuses_is_known_without_a_run():
    """The same as the table of what works where, but for those that engage in no run."""
    found = {each.method: each for each in methods.check(FLUX.pipe()).found}
    assert {each.state for each in found.values()} == {"applies", "refuses"}
    assert found["deepcache"].state == "refuses" and "deepcache" in found["deepcache"].why
    assert found["fora"].state == "applies" and found["fora"].apply == "fora.apply(pipe)"


@pytest.mark.slow
def test_a_run_tells_who_saves_and_the_pipeline_stays_as_it_was():
    pipe = SDXL.pipe()
    plain = SDXL.run(pipe, steps=6)
    found = methods.check(pipe, lambda: SDXL.run(pipe, steps=6))
    assert torch.equal(SDXL.run(pipe, steps=6), plain)
    rows = {each.method: each for each in found.found}
    assert rows["tome"].setting == {"max_downsample": 2} and 0 < rows["tome"].saved < 1
    assert rows["tome"].apply == "tome.apply(pipe, tome.Config(max_downsample=2))"
    assert rows["cesdi"].state == "refuses" and "two prompts" in rows["cesdi"].why
    assert rows["deepcache"].cached_bytes > 0 and {each.state for each in found.found} <= STATES.keys()
    text = str(found)
    assert text.startswith("UNet2DConditionModel: ") and len(text.splitlines()) == 1 + len(found.found)
    saved = [each.saved for each in found.found if each.state == "engaged" and each.saved is not None]
    assert saved == sorted(saved, reverse=True)


def test_what_cannot_stack_with_a_patch_that_is_there_refuses():
    pipe = FLUX.pipe()
    with tome.apply(pipe), fora.apply(pipe):
        found = {each.method: each for each in methods.check(pipe).found}
    assert found["fora"].state == "refuses" and "already" in found["fora"].why


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        methods.check(torch.nn.Linear)
