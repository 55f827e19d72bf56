import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, WIDTH, Family

from accel_tools.measure.macs import count_macs
from methods import deepcache, tgate, tgate_v2
from methods._core.context import Rows
from methods._core.denoiser import describe
from methods.tgate import Config

CROSSED = ["unet", "sdxl", "pixart", "latte"]


@pytest.mark.parametrize("check, case", contract.cases(tgate, tgate.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def test_mean_of_halves():
    x = torch.arange(12.0).view(6, 2)                              # two prompts
    assert torch.equal(tgate.mean_of_halves(x[:4], Rows(("null", "cond"), 2)), (x[:2] + x[2:4]) / 2)
    assert torch.equal(tgate.mean_of_halves(x[:4], Rows(("cond", "null"), 1)), (x[:2] + x[2:4]) / 2)     # of two frames each
    assert torch.equal(tgate.mean_of_halves(x, Rows(("null", "cond", "perturbed"), 2)), (x[:2] + x[2:4]) / 2)


def crossed(pipe):
    return [block.cross for block in describe(Family.model(pipe)).blocks if block.cross is not None]


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("gate", [1, 3, 6])
def test_projections_run_m_times_and_the_batch_halves_behind_them(name, gate):
    pipe, seen, counts = FAMILIES[name].pipe(), [], {}
    for i, module in enumerate(crossed(pipe)):
        for part in ("to_q", "to_k", "to_v"):
            getattr(module, part).register_forward_hook(lambda *_, key=(i, part): counts.update({key: counts.get(key, 0) + 1}))
    first = next(module for module in Family.model(pipe).modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    with tgate.apply(pipe, Config(gate=gate)):
        FAMILIES[name].run(pipe, steps=6, batch=2)
    assert set(counts.values()) == {gate} and len(counts) == 3 * len(crossed(pipe))
    assert seen == [seen[0]] * gate + [seen[0] // 2] * (6 - gate)


@pytest.mark.parametrize("name", CROSSED)
def test_a_gate_at_the_end_is_the_plain_run(name):
    pipe = FAMILIES[name].pipe()
    with tgate.apply(pipe, Config(gate=4)) as patch:
        assert torch.equal(FAMILIES[name].run(pipe, steps=4), contract.plain(name, steps=4))
        assert patch.report()["state"] == "no gain" and patch.report()["reason"] == "the run ends before the gate"


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_given_again_is_the_mean_at_the_gate(name, dtype):
    pipe, gave = FAMILIES[name].pipe(), []
    crossed(pipe)[-1].register_forward_hook(lambda m, args, out: gave.append(out))
    with tgate.apply(pipe, Config(gate=2)) as patch:
        patch.limit(dtype=dtype)
        FAMILIES[name].run(pipe, steps=5, batch=2)
    null, cond = (gave[1] if dtype is None else gave[1].to(dtype).to(gave[1].dtype)).chunk(2)
    mean = (null + cond) / 2
    mean = mean if dtype is None else mean.to(dtype).to(mean.dtype)
    assert len(gave) == 5 and gave[1].shape[0] == 2 * mean.shape[0] and not torch.equal(null, cond)
    assert all(torch.equal(out, mean) and not out.requires_grad for out in gave[2:])


def by_hand(pipe, gate):
    """Another program: attentions that know the step by counting calls, and a model that is handed halves from the gate on."""
    model, step, frozen = Family.model(pipe), [-1], {}
    plain = model.forward

    def attention(module, forward):
        def run(*args, **kwargs):
            if step[0] >= gate:
                return frozen[module]
            out = forward(*args, **kwargs)
            frozen[module] = (out.chunk(2)[0] + out.chunk(2)[1]) / 2
            return out
        return run

    def first_half(x, batch):
        if torch.is_tensor(x) and x.ndim and len(x) == batch:
            return x[: batch // 2]
        return {key: first_half(value, batch) for key, value in x.items()} if isinstance(x, dict) else x

    def run(*args, **kwargs):
        step[0] += 1
        if step[0] < gate:
            return plain(*args, **kwargs)
        batch = len((*args, *kwargs.values())[0])
        out = plain(*(first_half(x, batch) for x in args), **first_half(kwargs, batch))
        if isinstance(out, tuple):
            return (torch.cat([out[0]] * 2),)
        out.sample = torch.cat([out.sample] * 2)
        return out

    for module in crossed(pipe):
        module.forward = attention(module, module.forward)
    model.forward = run
    return pipe


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("gate, steps, seed", [(1, 4, 2), (4, 7, 5)])
def test_whole_runs_equal_a_program_by_hand(name, gate, steps, seed):
    family, setting = FAMILIES[name], dict(steps=steps, seed=seed, size=(40, 24), batch=2)
    pipe = family.pipe()
    with tgate.apply(pipe, Config(gate=gate)):
        ours = family.run(pipe, **setting)
    assert torch.equal(ours, family.run(by_hand(family.pipe(), gate), **setting))


@pytest.mark.parametrize("name", CROSSED)
def test_is_the_second_version_without_reuse_of_self_attention(name):
    outs = []
    for method, config in ((tgate, Config(gate=3)), (tgate_v2, tgate_v2.Config(gate=3, sp_interval=1))):
        pipe = FAMILIES[name].pipe()
        with method.apply(pipe, config) as patch:
            outs.append(FAMILIES[name].run(pipe, steps=6, batch=2))
            assert patch.counts["halved"] == 3
    assert torch.equal(*outs)


def draw(pipe, text, null, guidance, steps=6, **more):
    """Latents of a UNet pipeline for embedded prompts (B, words, width), one seed for each."""
    generator = [torch.Generator().manual_seed(i) for i in range(len(text))]
    return pipe(prompt_embeds=text, negative_prompt_embeds=null, guidance_scale=guidance, num_inference_steps=steps, height=32,
                width=48, output_type="latent", generator=generator, **more).images


def test_from_the_gate_on_neither_the_text_nor_the_scale_matter():
    """A latent and caches put in behind the last guided step end where they do under any other text and scale."""
    outs = []
    for seed, scale in ((3, 3.0), (4, 9.0)):
        pipe = FAMILIES["unet"].pipe()
        for module in crossed(pipe):                               # what is frozen is the same constant
            module.register_forward_hook(lambda m, args, out: torch.full_like(out, 0.25))
        texts = torch.randn(2, 1, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
        with tgate.apply(pipe, Config(gate=2)):
            outs.append(draw(pipe, *texts, scale, callback_on_step_end=lambda pipe, i, t, given: {
                "latents": torch.ones_like(given["latents"]) if i == 1 else given["latents"]}))
    assert torch.equal(*outs)


def test_where_both_prompts_are_one_the_gate_only_freezes():
    """The mean of equal halves is either of them: the run is that without guidance."""
    text, outs = torch.randn(1, 5, WIDTH), []
    for guidance in (3.0, 1.0):
        pipe = FAMILIES["unet"].pipe()
        with tgate.apply(pipe, Config(gate=2)) as patch:
            outs.append(draw(pipe, text, text, guidance))
            assert patch.counts["halved"] == (4 if guidance > 1 else 0)
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-4)


def test_two_prompts_without_guidance_are_not_mixed():
    texts, outs = torch.randn(2, 5, WIDTH), []
    for rows in (texts, texts[:1]):
        pipe = FAMILIES["unet"].pipe()
        with tgate.apply(pipe, Config(gate=2)):
            outs.append(draw(pipe, rows, rows, 1.0))
    torch.testing.assert_close(outs[0][:1], outs[1], atol=1e-3, rtol=1e-4)


def test_what_is_left_from_the_gate_on_is_the_null_prompt():
    """SDXL adds conditions of each prompt to its timestep."""
    pipe, added = FAMILIES["sdxl"].pipe(), []
    pipe.unet.add_embedding.register_forward_pre_hook(lambda m, args: added.append(args[0]))
    with tgate.apply(pipe, Config(gate=2)):
        FAMILIES["sdxl"].run(pipe, steps=4, batch=2)
    null, cond = added[0].chunk(2)
    assert not torch.equal(null, cond) and torch.equal(added[2], null) and torch.equal(added[3], null)


@pytest.mark.slow
@pytest.mark.parametrize("name", CROSSED)
def test_cost(name):
    """Half of everything from the gate on, and of that half all but cross-attention: (2 m + T - m) X - (T - m) Y."""
    family, costs = FAMILIES[name], {}
    for gate in (2, 4, None):
        pipe = family.pipe()
        with tgate.apply(pipe, Config(gate=gate)):
            costs[gate] = count_macs(lambda pipe=pipe: family.run(pipe, steps=5))
    pipe, calls = family.pipe(), []
    for module in crossed(pipe):
        module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    family.run(pipe, steps=1, guidance=1.0)
    cross = count_macs(lambda: [module.forward(*args, **kwargs) for module, args, kwargs in calls])
    half = costs[None] / 10
    for gate in (2, 4):
        assert costs[gate] == (2 * gate + 5 - gate) * half - (5 - gate) * cross


def test_the_cost_of_sdxl_as_reported():
    """149.438 T for 25 steps of two halves; behind gate 10 one half without its cross-attention: 84.438 T."""
    half = 149.438 / 50
    assert half == pytest.approx(2.98876) and (10 * 2 + 15) * half == pytest.approx(104.607, abs=1e-3)
    assert ((10 * 2 + 15) * half - 84.438) / 15 == pytest.approx(1.3446, abs=1e-4)


def test_with_deepcache_the_first_half_batch_is_a_full_step():
    pipe, seen = FAMILIES["unet"].pipe(), []
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda m, args, out: seen.append(len(out)))
    with tgate.apply(pipe, Config(gate=4)), deepcache.apply(pipe, deepcache.Config(interval=3)):
        out = FAMILIES["unet"].run(pipe, steps=9)
    assert seen == [2, 2, 1, 1] and out.isfinite().all()           # steps 0 and 3; 4, with nothing kept yet, and 6


def test_a_gate_of_zero_is_named():
    with pytest.raises(ValueError, match="gate=0"):
        Config(gate=0)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "cogvideox"])
def test_a_model_without_cross_attention_is_refused(name):
    with pytest.raises(ValueError, match="has no cross-attention"):
        tgate.apply(FAMILIES[name].pipe())
