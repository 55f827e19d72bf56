import math

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from methods import adaptive_guidance
from methods._core.context import experts, split_target
from methods.adaptive_guidance import TINY, Config

ONE_CALL = ["unet", "dit", "pixart", "sd3", "latte", "cogvideox"]
TWO_CALLS = ["wan", "qwen-image", "chroma", "cogview4", "cosmos", "lumina2", "flux2-klein"]


@pytest.mark.parametrize("check, case", contract.cases(adaptive_guidance, TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("check", [contract.on_changes_the_result_and_costs_less, contract.removal_restores_every_bit,
                                   contract.runs_leave_nothing_behind, contract.an_interrupted_run_leaves_nothing_behind,
                                   contract.what_is_kept_can_be_limited, contract.half_precision])
def test_contract_where_guidance_makes_two_calls(check):
    check(contract.Case(adaptive_guidance, TINY, FAMILIES["wan"]))


# (1, .1) and (1, -.1); (3, 4) and (4, 3); a difference of a hundredth of the norm, at right angles
@pytest.mark.parametrize("cond, null, gamma", [((1, 0.1), (1, -0.1), 0.980198), ((3, 4), (4, 3), 0.96),
                                               ((1, 0), (1, 0.01), 0.99995), ((1, 2), (-2, 1), 0.0),
                                               ((1, 2), (-3, -6), -1.0), ((0.5, 1), (2, 4), 1.0)])
def test_numbers_worked_by_hand(cond, null, gamma):
    found = adaptive_guidance.similarity(torch.tensor([cond, null]), torch.tensor([null, null]).float())
    assert found.tolist() == pytest.approx([gamma, 1.0], abs=2e-6)


def cosine(a, b):
    """In plain numbers."""
    a, b = a.flatten().tolist(), b.flatten().tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (2, 9, 6), (1, 3, 2, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_similarity_is_over_all_entries_of_a_sample(shape, dtype):
    cond, null = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    null = (cond + null / 2).to(dtype)
    found = adaptive_guidance.similarity(cond, null)
    assert found.tolist() == pytest.approx([cosine(a, b) for a, b in zip(cond, null, strict=True)], abs=1e-6)


def test_once_reached_the_threshold_stays_reached():
    assert adaptive_guidance.reached([False, True, False, False], [0.5, 0.1, 0.9, 0.89], 0.9) == [False, True, True, False]


class Sampler:
    """A pipeline of a few lines over a small DiT and several classes, in one batch with the conditional half first or in two
    calls; `calls=0` samples each class alone and follows the rule by hand, with no patch."""

    def __init__(self, calls: int, threshold: float | None = None):
        pipe = FAMILIES["dit"].pipe()
        self.transformer, self.scheduler, self.calls, self.threshold = pipe.transformer, pipe.scheduler, calls, threshold
        self.do_classifier_free_guidance = calls == 1
        self.used: list[torch.Tensor] = []                # what guidance made in each step
        self.conds: list[torch.Tensor] = []
        self.evaluations: list[int] = []

    def predict(self, x, t, labels):
        return self.transformer(x, timestep=t.expand(len(x)), class_labels=labels).sample

    def run(self, x, labels, steps):
        self.scheduler.set_timesteps(steps)
        none, stopped, evaluations = torch.full_like(labels, 1000), False, 0
        for t in self.scheduler.timesteps:
            if self.calls == 1:
                yes, no = self.predict(torch.cat([x, x]), t, torch.cat([labels, none])).chunk(2)
            else:
                yes, no = self.predict(x, t, labels), None
                evaluations += 1
                if not stopped:
                    no = self.predict(x, t, none)
                    evaluations += 1
            if self.calls == 0 and not stopped:
                stopped = cosine(yes, no) >= self.threshold
            made = yes if stopped else no + 3 * (yes - no)
            self.used.append(made)
            self.conds.append(yes)
            x = self.scheduler.step(made, t, x, return_dict=False)[0]
        self.evaluations.append(evaluations)
        return x

    def __call__(self, labels=(3, 7), steps=10):
        x = torch.randn(len(labels), 4, 16, 16, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor(labels)
        if self.calls:
            return self.run(x, labels, steps)
        return torch.cat([self.run(x[i:i + 1], labels[i:i + 1], steps) for i in range(len(x))])


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("threshold", [-1.0, 0.6, 0.7, 0.8, 1.0])
def test_each_sample_of_a_batch_gets_the_result_of_its_own_run(calls, threshold):
    """Against a loop that takes the classes one by one: with T = 10 and the threshold reached in step k, T + k + 1 evaluations
    of each, and in a batch those of the slowest."""
    alone, batch = Sampler(0, threshold), Sampler(calls)
    theirs = alone((3, 7, 1))
    with adaptive_guidance.apply(batch, Config(threshold=threshold)) as patch:
        ours, report = batch((3, 7, 1)), patch.report()
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)
    slowest = max(alone.evaluations)
    assert 20 * (1 - report["saved"]) == pytest.approx(slowest)
    assert (report["guided"], report.get("alone", 0)) == (slowest - 10, 20 - slowest)
    assert report["state"] == ("engaged" if slowest < 20 else "no gain")
    if 0 < threshold < 0.8:
        assert slowest < 20 and len(set(alone.evaluations)) > 1       # the classes do stop in different steps


@pytest.mark.parametrize("calls", [1, 2])
def test_what_guidance_makes_behind_the_threshold_is_the_conditional_prediction_bit_for_bit(calls):
    alone, batch = Sampler(0, 0.6), Sampler(calls)
    alone((3, 7, 1))
    with adaptive_guidance.apply(batch, Config(threshold=0.6)):
        batch((3, 7, 1))
    reached = [evaluations - 11 for evaluations in alone.evaluations]
    assert reached == [3, 0, 2]
    for i, (made, cond) in enumerate(zip(batch.used, batch.conds, strict=True)):
        assert [torch.equal(*pair) for pair in zip(made, cond, strict=True)] == [i >= k for k in reached]


@pytest.mark.parametrize("calls", [1, 2])
def test_the_unconditional_rows_are_not_run_once_all_samples_are_done(calls):
    sampler, rows = Sampler(calls), []
    sampler.transformer.transformer_blocks[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    with adaptive_guidance.apply(sampler, Config(threshold=0.6)):
        sampler((3, 7, 1))
    assert rows == ([6] * 4 + [3] * 6 if calls == 1 else [3] * 8 + [3] * 6)


@pytest.mark.parametrize("name", ONE_CALL + TWO_CALLS)
def test_stopped_at_once_a_run_is_the_one_without_guidance(name):
    """Whatever the pipeline makes of the predictions, also where it rescales or normalises them."""
    family = FAMILIES[name]
    pipe = family.pipe()
    guided, plain = (family.run(pipe, guidance=scale, batch=2) for scale in (3.0, 1.0))
    with adaptive_guidance.apply(pipe, TINY) as patch:
        ours = family.run(pipe, batch=2)
        assert patch.report()["guided"] == 1 and patch.report()["saved"] == 0.375          # 3 of 8
    torch.testing.assert_close(ours, plain, atol=5e-5 * float(plain.abs().max()), rtol=0)
    assert (guided - plain).abs().max() > 100 * (ours - plain).abs().max()


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_a_threshold_never_reached_is_the_plain_run(name):
    family = FAMILIES[name]
    pipe = family.pipe()
    with adaptive_guidance.apply(pipe, Config(threshold=1.0)) as patch:
        assert torch.equal(family.run(pipe, steps=5), contract.plain(name))
        assert patch.report()["state"] == "no gain" and "the highest similarity seen was 0." in patch.report()["reason"]


def test_a_threshold_reached_in_the_last_step_saves_nothing():
    sampler = Sampler(1)
    with adaptive_guidance.apply(sampler, Config(threshold=-1.0)) as patch:
        sampler(steps=1)
        assert patch.report()["state"] == "no gain" and patch.report()["guided"] == 1


def test_flux_with_a_negative_prompt_makes_two_calls():
    family = FAMILIES["flux"]
    pipe, null = family.pipe(), torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(9))
    setting = dict(steps=6, size=(32, 48), negative_prompt_embeds=null, negative_pooled_prompt_embeds=null[:, 0])
    plain, guided = family.run(pipe, **setting), family.run(pipe, true_cfg_scale=2.0, **setting)
    with adaptive_guidance.apply(pipe, TINY) as patch:
        assert torch.equal(family.run(pipe, true_cfg_scale=2.0, **setting), plain) and not torch.equal(guided, plain)
        assert patch.report()["alone"] == 5
        assert torch.equal(family.run(pipe, **setting), plain)
        assert patch.report()["reason"] == "no call is guided"


def test_guidance_by_skipped_layers_goes_on():
    """Its third branch, a call of its own, is no unconditional one."""
    family = FAMILIES["sd3"]
    pipe = family.pipe()
    setting = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    with adaptive_guidance.apply(pipe, TINY) as patch:
        ours, report = family.run(pipe, **setting), patch.report()
        assert (report["guided"], report["alone"]) == (1, 3)
        assert not torch.allclose(ours, family.run(pipe), atol=1e-3)


def test_each_of_two_experts_looks_for_itself():
    family = FAMILIES["wan22"]
    pipe, calls = family.pipe(), []
    for target in experts(pipe):
        _, model = split_target(target)
        model.blocks[0].register_forward_hook(lambda module, args, out, model=model: calls.append(id(model)))
    with adaptive_guidance.apply(pipe, TINY):
        family.run(pipe, steps=5)
    first = calls.index(next(each for each in calls if each != calls[0]))
    assert len(calls) == 5 + 2 and first > 1 and calls == [calls[0]] * first + [calls[-1]] * (7 - first)


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_observe_sees_every_guided_step_and_changes_nothing(name):
    family, seen = FAMILIES[name], []
    pipe = family.pipe()
    with adaptive_guidance.observe(pipe, seen):
        assert torch.equal(family.run(pipe, steps=5, batch=2), contract.plain(name, batch=2))
    assert [len(each) for each in seen] == [2] * 5 and all(-1 <= gamma <= 1 for each in seen for gamma in each)


def test_observe_sees_the_cosine_of_both_predictions():
    sampler, seen, gave = Sampler(1), [], []
    sampler.transformer.register_forward_hook(lambda module, args, out: gave.append(out.sample))
    with adaptive_guidance.observe(sampler, seen):
        sampler(steps=4)
    by_hand = [[cosine(*pair) for pair in zip(*out.chunk(2), strict=True)] for out in gave]
    assert seen == [pytest.approx(each, abs=1e-5) for each in by_hand] and len(seen) == 4


def test_a_learned_variance_is_not_compared():
    family, seen = FAMILIES["pixart"], []
    pipe, gave = family.pipe(), []
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config | {"out_channels": 8}).eval()
    pipe.transformer.register_forward_hook(lambda module, args, out: gave.append(out[0]))
    with adaptive_guidance.observe(pipe, seen):
        family.run(pipe, steps=2)
    assert [out.shape[1] for out in gave] == [8, 8]
    for out, (gamma,) in zip(gave, seen, strict=True):
        null, cond = out.chunk(2)
        assert gamma == pytest.approx(cosine(cond[:, :4], null[:, :4]), abs=1e-5)
        assert gamma != pytest.approx(cosine(cond, null), abs=1e-5)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_limit_on_what_is_kept_does_not_touch_guidance(calls):
    outs = []
    for limit in ({}, {"bytes": 0}, {"dtype": torch.bfloat16}):
        sampler = Sampler(calls)
        with adaptive_guidance.apply(sampler, Config(threshold=0.6)).limit(**limit):
            outs.append(sampler((3, 7, 1)))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("wrong", [1.01, -1.5, float("nan")])
def test_bad_values_are_named(wrong):
    with pytest.raises(ValueError, match=f"threshold={wrong} is no cosine"):
        Config(threshold=wrong)


@pytest.mark.parametrize("put", [adaptive_guidance.apply, lambda target: adaptive_guidance.observe(target, [])])
def test_targets_that_do_not_fit_are_refused(put):
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        put(FAMILIES["dit"].pipe().transformer)
    with pytest.raises(ValueError, match="takes calls of the denoiser apart"):
        put(FAMILIES["z-image"].pipe())
    with pytest.raises(ValueError, match="the guider of this pipeline is of type AdaptiveProjectedMixGuidance"):
        put(FAMILIES["hunyuan-image"].pipe())


def test_a_guider_exchanged_behind_a_patch_is_refused():
    pipe, other = FAMILIES["hunyuan-video-15"].pipe(), FAMILIES["hunyuan-image"].pipe().guider
    with adaptive_guidance.apply(pipe, TINY):
        pipe.guider = other
        with pytest.raises(ValueError, match="ends classifier-free guidance"):
            FAMILIES["hunyuan-video-15"].run(pipe)
