import pytest
import torch
import two_calls
from contracts import patch as contract
from diffusers import EulerDiscreteScheduler
from families import FAMILIES, FIRST, Family

from methods import faster_diffusion
from methods._core.context import Rows
from methods._core.denoiser import describe
from methods.faster_diffusion import Config

QUIET = dict(noise=0.0)


@pytest.mark.parametrize("check, case", contract.cases(faster_diffusion, Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


def test_lists_of_key_steps():
    keys = faster_diffusion.key_steps
    assert sorted(keys(50, "50ls")) == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert sorted(keys(50, "pro")) == [0, 2, 5, 9, 14, 20, 27, 35, 44]
    assert sorted(keys(10, 4)) == [0, 4, 8] and keys(7, 1) == set(range(7))
    assert keys(100, "100ls") == {i for i in range(100) if i > 85 or i < 10 or i % 5 == 0} and len(keys(100, "100ls")) == 40
    assert keys(75, "75ls") == {i for i in range(75) if i > 65 or i < 10 or i % 5 == 0} and len(keys(75, "75ls")) == 31
    assert sorted(keys(20, "50ls")) == [0, 1, 2, 4, 6, 10, 14]


def test_key_steps_of_dit():
    """113 of 250 steps; of 28 blocks the first 18 are left out in the other 137."""
    keys = faster_diffusion.key_steps(250, "dit")
    assert keys == set(range(250)) - {i for i in range(1, 230) if i % 10 < 6} and len(keys) == 113
    assert 250 * 28 - 18 * (250 - len(keys)) == 4534


def test_steps_are_tiled_within_each_part_of_guidance():
    """B = 2, S = 3: null of step 0, of step 1, of step 2, then cond."""
    rows = Rows(("null", "cond"), 2)
    x = torch.tensor([[1.0], [2.0], [11.0], [12.0]])
    found = faster_diffusion.tiled({"x": x, "ids": torch.arange(3), "more": (x, None), "scale": 2.0}, rows, 3)
    assert found["x"].flatten().tolist() == [1, 2] * 3 + [11, 12] * 3 and torch.equal(found["more"][0], found["x"])
    assert found["ids"].tolist() == [0, 1, 2] and found["more"][1] is None and found["scale"] == 2.0


def watched(pipe):
    """Batches that enter the encoder, and batches that the whole of the decoder sees, call by call."""
    denoiser, seen = describe(Family.model(pipe)), ([], [])
    if denoiser.unet:
        places = [next(stage.module for stage in denoiser.unet if stage.side == side) for side in ("mid", "up")]
        places = [place.resnets[0] for place in places]
    else:
        places = [denoiser.blocks[0].norm, denoiser.tail]
    for place, batches in zip(places, seen, strict=True):
        place.register_forward_hook(lambda m, args, out, batches=batches: batches.append(
            len(args[0]) if args else len(out[0] if isinstance(out, tuple) else out)))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("together, batches", [(15, [4] * 6 + [4 * 4, 4, 4 * 4, 4, 4 * 9, 4, 4 * 9, 4, 4 * 14]),
                                               (1, [4] * 50)])
def test_the_encoder_runs_nine_times_and_the_decoder_takes_a_span_at_once(together, batches):
    pipe = FAMILIES["unet"].pipe()
    encoded, decoded = watched(pipe)
    with faster_diffusion.apply(pipe, Config(together=together)) as patch:
        FAMILIES["unet"].run(pipe, steps=50, batch=2)
        report = patch.report()
    assert encoded == [4] * 9 and sum(decoded) == 4 * 50 and sorted(decoded) == sorted(batches)
    assert report["keys"] == 9 and report["decoded"] == 41 and report["injected"] == 25


def test_a_span_may_be_cut():
    pipe = FAMILIES["unet"].pipe()
    _, decoded = watched(pipe)
    with faster_diffusion.apply(pipe, Config(keys=8, together=3)):
        FAMILIES["unet"].run(pipe, steps=10)
    assert decoded == [2, 6, 6, 2, 2, 2]                           # 0; 1 to 3; 4 to 6; 7; 8; 9


@pytest.mark.parametrize("name", FIRST)
def test_one_by_one_or_together_gives_the_same(name):
    outs = []
    for together in (1, 2, 9):
        pipe = FAMILIES[name].pipe()
        with faster_diffusion.apply(pipe, Config(keys=4, together=together)) as patch:
            outs.append(FAMILIES[name].run(pipe, steps=7, size=FAMILIES[name].sizes[1], batch=2))
            assert patch.report()["keys"] == 2
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-4 * float(out.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", FIRST)
def test_all_steps_keys_and_no_noise_is_the_plain_run(name):
    pipe = FAMILIES[name].pipe()
    with faster_diffusion.apply(pipe, Config(keys="100ls", noise=0.0)) as patch:              # of 1 step
        assert torch.equal(FAMILIES[name].run(pipe, steps=1), contract.plain(name, steps=1))
        assert patch.report()["reason"] == "the run has one step"
    assert faster_diffusion.apply(pipe, Config(keys=1, noise=0.0)).off


def by_hand(pipe, keys):
    """Another program, one step at a time: the model gets the latent of the last key step, and modules of its encoder say
    again what they said then."""
    model, step, first = Family.model(pipe), [-1], {}
    denoiser, plain = describe(model), model.forward

    def again(module):
        forward, said = module.forward, []

        def run(*args, **kwargs):
            if step[0] in keys:
                said[:] = [forward(*args, **kwargs)]
            return said[0]
        module.forward = run

    for part in faster_diffusion.encoder(denoiser, 0.5):
        again(getattr(part, "module", part))

    def run(*args, **kwargs):
        step[0] += 1
        named = dict(zip([denoiser.row.latent, "timestep"], args, strict=False)) | kwargs
        first["x"] = named[denoiser.row.latent] if step[0] in keys else first["x"]
        return plain(**named | {denoiser.row.latent: first["x"]})
    model.forward = run
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "sdxl", "dit", "pixart", "latte", "cogvideox", "sd3"])
def test_whole_runs_equal_a_program_by_hand(name):
    family, setting = FAMILIES[name], dict(steps=9, seed=3, size=FAMILIES[name].sizes[1], batch=2)
    keys = faster_diffusion.key_steps(9, 4)
    theirs = family.run(by_hand(family.pipe(), keys), **setting)
    assert not torch.equal(theirs, family.run(family.pipe(), **setting))
    pipe = family.pipe()
    with faster_diffusion.apply(pipe, Config(keys=4, share=0.5, together=1, noise=0.0)):
        assert torch.equal(family.run(pipe, **setting), theirs)


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_a_latent_behind_a_key_step_does_not_enter_the_model(name):
    outs = []
    for scale in (1.0, 100.0):
        pipe, gave = FAMILIES[name].pipe(), []
        with faster_diffusion.apply(pipe, Config(keys=3, share=0.5, together=1)) as patch:
            patch.after_call(lambda context, out, gave=gave: gave.append(out))
            step = pipe.scheduler.step

            def moved(out, t, sample, *args, scale=scale, step=step, gave=gave, **kwargs):
                result = step(out, t, sample, *args, **kwargs)
                return tuple(x * scale if len(gave) == 1 and torch.is_tensor(x) else x for x in result)
            pipe.scheduler.step = moved
            FAMILIES[name].run(pipe, steps=3)
            pipe.scheduler.step = step
        outs.append(gave)
    assert len(outs[0]) == 3 and all(map(torch.equal, *outs)) and not torch.equal(outs[0][0], outs[0][1])


def test_the_noise_that_is_added_is_the_first_latent_and_only_late():
    pipe, samples, steps = FAMILIES["unet"].pipe(), [], []
    with faster_diffusion.apply(pipe, Config(keys=1, noise=0.5, below=0.45)) as patch:
        solver = patch.solver
        solver.set_timesteps(lambda *_: None)
        first, later = torch.ones(1, 2), torch.full((1, 2), 3.0)
        for t, x in ((900.0, first), (450.0, later), (449.0, later)):
            solver.step(lambda out, t, sample: samples.append(sample), None, torch.tensor(t), x)
            steps.append(t)
    assert torch.equal(samples[0], first) and torch.equal(samples[1], later) and torch.equal(samples[2], later + 0.5 * first)


def test_a_solver_that_scales_its_input_is_scaled_for_the_key_step():
    """The input of a span is what the model got in its key step."""
    pipe, seen = FAMILIES["unet"].pipe(), []
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with faster_diffusion.apply(pipe, Config(keys=3, noise=0.0)):
        pipe.unet.conv_in.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        out = FAMILIES["unet"].run(pipe, steps=6)
    assert [len(x) for x in seen] == [2, 4, 2, 4] and torch.equal(seen[1], seen[0].repeat_interleave(2, 0))
    assert out.isfinite().all()


def test_without_guidance_samples_are_not_mixed():
    outs = []
    for batch in (1, 3):
        pipe = FAMILIES["unet"].pipe()
        texts = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))[:batch]
        with faster_diffusion.apply(pipe, Config(keys=4)):
            outs.append(pipe(prompt_embeds=texts, guidance_scale=1.0, num_inference_steps=6, height=32, width=48,
                             output_type="latent", generator=[torch.Generator().manual_seed(i) for i in range(batch)]).images)
    torch.testing.assert_close(outs[1][:1], outs[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["dit", "cogvideox"])
def test_guidance_in_two_calls_gives_the_same(name):
    (one, first), (two, second) = two_calls.both(faster_diffusion, Config(keys=4), name)
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    assert first["decoded"] == 9 and second["decoded"] == 18 and first["saved"] == second["saved"]


@pytest.mark.parametrize("wrong, named", [({"keys": "some"}, "keys='some'"), ({"keys": 0}, "keys=0"),
                                          ({"together": 0}, "together=0"), ({"share": 1.0}, "share=1.0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    pipe = FAMILIES["dit"].pipe()
    with pytest.raises(ValueError, match="no encoder of share=0.1"):
        faster_diffusion.apply(pipe, Config(share=0.1))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        faster_diffusion.apply(pipe.transformer)
