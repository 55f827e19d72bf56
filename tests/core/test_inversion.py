import pytest
import torch
from families import FAMILIES

from methods import pfdiff
from methods._core.inversion import ascend
from methods._core.patch import Patch

FLUX = FAMILIES["flux"]


def call(steps):
    return FLUX.call(1, 0) | {"height": 32, "width": 32, "num_inference_steps": steps}


def test_levels_times_and_velocities_on_the_way_up():
    """Each step leaves a level with the time of the next, as sampling then leaves that one."""
    pipe, times, seen = FLUX.pipe(), [], []
    pipe.transformer.register_forward_hook(
        lambda _, args, given, out: times.append(float(given["timestep"][0])) or (torch.ones_like(given["hidden_states"]),),
        with_kwargs=True)
    z0 = torch.zeros(1, 64, 16)

    def control(velocity, z, level):
        seen.append((float(z[0, 0, 0]), level))
        return velocity
    passed = ascend(Patch(pipe, "toy"), z0, call(4), control)
    assert times == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [float(z[0, 0, 0]) for z in passed] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [level for _, level in seen] == pytest.approx([0, 0.25, 0.5, 0.75]) == [z for z, _ in seen]
    doubled = ascend(Patch(pipe, "toy"), z0, call(4), lambda velocity, z, level: 2 * velocity)
    assert float(doubled[-1][0, 0, 0]) == pytest.approx(2)


def test_the_pipeline_is_as_it_was():
    pipe = FLUX.pipe()
    plain = FLUX.run(pipe)
    ascend(Patch(pipe, "toy"), torch.zeros(1, 64, 16), call(3))
    assert torch.equal(FLUX.run(pipe), plain) and "_patch_site" not in vars(pipe.transformer)


def test_a_solver_on_the_pipeline_is_refused():
    pipe = FLUX.pipe()
    with pfdiff.apply(pipe), pytest.raises(ValueError, match="both replace the steps"):
        ascend(Patch(pipe, "toy"), torch.zeros(1, 64, 16), call(3))
