import pytest
import torch
from contracts import patch as contract
from diffusers import UNet2DConditionModel
from families import FAMILIES, WIDTH

from methods import deepcache
from methods._core.denoiser import describe


@pytest.mark.parametrize("check, case", contract.cases(deepcache, deepcache.Config(interval=2)), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("steps, interval, full", [(50, 5, list(range(0, 50, 5))), (50, 3, list(range(0, 50, 3))), (4, 9, [0])])
def test_uniform_steps(steps, interval, full):
    assert deepcache.uniform_steps(steps, interval) == full


@pytest.mark.parametrize("interval, center, power, full", [
    (5, 15, 1.4, [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),
    (5, 10, 1.2, [0, 5, 9, 12, 16, 21, 26, 32, 38, 43]),
    (2, 15, 1.4, [0, 2, 4, 6, 7, 9, 11, 12, 14, 15, 17, 18, 20, 22, 24, 26, 28, 30, 32, 35, 37, 39, 42, 44, 47])])
def test_nonuniform_steps(interval, center, power, full):
    assert deepcache.nonuniform_steps(50, interval, center, power) == full


# horseee/DeepCache@1691a3ab2230, sample_from_quad_center of its research pipeline, where two grid points share an integer
@pytest.mark.parametrize("steps, interval, center, power, full", [
    (25, 2, 2, 1.6, [0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 19, 22]),
    (25, 2, 19, 2.0, [0, 3, 6, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23]), (30, 3, 1, 2.0, [0, 1, 2, 3, 6, 9, 12, 16, 20, 25])])
def test_nonuniform_steps_of_the_official_code(steps, interval, center, power, full):
    assert deepcache.nonuniform_steps(steps, interval, center, power) == full


def test_an_impossible_schedule_is_refused():
    with pytest.raises(ValueError, match="no non-uniform schedule of 10 distinct steps among 10"):
        deepcache.nonuniform_steps(10, 1, 9, 1.01)


@pytest.fixture(scope="module")
def sd15():
    """Stable Diffusion 1.5 in structure (four stages, twelve skip connections), narrow."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 16, 16), cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3).eval().requires_grad_(False)


RUNS = {      # branch: (resnets run on the way down, downsamplers, resnets on the way up by stage from full resolution)
    0: ([0, 0, 0, 0], 0, [1, 0, 0, 0]), 1: ([1, 0, 0, 0], 0, [2, 0, 0, 0]), 2: ([2, 0, 0, 0], 0, [3, 0, 0, 0]),
    3: ([2, 0, 0, 0], 1, [3, 1, 0, 0]), 4: ([2, 1, 0, 0], 1, [3, 2, 0, 0]), 6: ([2, 2, 0, 0], 2, [3, 3, 1, 0]),
    11: ([2, 2, 2, 2], 3, [3, 3, 3, 3])}


@pytest.mark.parametrize("branch", RUNS)
def test_what_runs_on_shallow_steps(sd15, branch):
    calls, handles = [], []
    stages = [stage for stage in describe(sd15).unet if stage.side != "mid"]
    for stage in stages:
        for layer in stage.layers:
            key = stage.side, stage.number
            handles.append(layer[0].conv1.register_forward_hook(lambda *_, key=key: calls.append(key)))
        if stage.side == "down" and stage.sampler is not None:
            handles.append(stage.sampler.conv.register_forward_hook(lambda *_: calls.append("sampler")))
    middle = sd15.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: calls.append("mid"))
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 3, WIDTH)
    with deepcache.apply(sd15, deepcache.Config(interval=2, branch=branch)) as patch:
        first = sd15(x, 10, text).sample
        assert "mid" in calls
        calls.clear()
        again = sd15(x, 10, text).sample
        assert patch.report()["cached_bytes"] > 0
    for handle in [*handles, middle]:
        handle.remove()
    down, samplers, up = RUNS[branch]
    assert [calls.count(("down", i)) for i in range(4)] == down
    assert calls.count("sampler") == samplers and "mid" not in calls
    assert [calls.count(("up", i)) for i in range(4)] == up
    assert torch.equal(first, again)                # the same input again: all that runs sees what it saw before


def test_the_kept_feature_enters_the_last_up_layer(sd15):
    with deepcache.apply(sd15, deepcache.Config(interval=2)) as patch:
        sd15(torch.randn(2, 4, 16, 16), 10, torch.randn(2, 3, WIDTH))
        assert patch.report()["cached_bytes"] == 2 * 8 * 16 * 16 * 4


def test_a_missing_branch_is_refused_and_named(sd15):
    with pytest.raises(ValueError, match="branch=12: this UNet has skip connections 0 to 11"):
        deepcache.apply(sd15, deepcache.Config(branch=12))
    assert "_patch_run" not in vars(sd15)


def test_the_middle_runs_once_in_n_steps():
    pipe, seen = FAMILIES["unet"].pipe(), []
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: seen.append(1))
    with deepcache.apply(pipe, deepcache.Config(interval=3)):
        FAMILIES["unet"].run(pipe, steps=8)
    assert len(seen) == 3


def test_nonuniform_runs_in_a_pipeline():
    pipe, seen = FAMILIES["unet"].pipe(), []
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: seen.append(1))
    with deepcache.apply(pipe, deepcache.Config(interval=5, power=1.4, center=15)):
        FAMILIES["unet"].run(pipe, steps=50)
    assert len(seen) == 10


@pytest.mark.parametrize("wrong, named", [({"interval": 0}, "interval=0"), ({"branch": -1}, "branch=-1"),
                                          ({"power": 1.0}, "power=1.0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        deepcache.Config(**wrong)


@pytest.mark.parametrize("interval, branch", [(3, 0), (2, 1), (2, 2), (2, 4)])
def test_equals_the_official_package(interval, branch):
    extension = pytest.importorskip("DeepCache")
    family = FAMILIES["unet"]
    pipe = family.pipe()
    with deepcache.apply(pipe, deepcache.Config(interval=interval, branch=branch)):
        ours = family.run(pipe, steps=7)
    helper = extension.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    theirs = family.run(pipe, steps=7)
    assert torch.equal(ours, theirs)
