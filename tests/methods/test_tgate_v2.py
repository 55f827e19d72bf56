import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, WIDTH, Family

from methods import deepcache, tgate_v2
from methods._core.denoiser import describe
from methods.tgate_v2 import Config

CROSSED = ["unet", "sdxl", "pixart", "latte"]


@pytest.mark.parametrize("check, case", contract.cases(tgate_v2, tgate_v2.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


def ran(family, config, steps, **setting):
    """(self-attention, cross-attention): the steps in which all of the modules compute, and the batch of each call."""
    pipe, step, batches = family.pipe(), [-1], []
    model = family.model(pipe)
    blocks = describe(model).blocks
    found = [{module: [] for module in (block.attn, block.cross)} for block in blocks if block.cross is not None]
    model.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    for each in found:
        for module, seen in each.items():
            module.to_q.register_forward_hook(lambda m, a, out, seen=seen: seen.append(step[0]))
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda m, a, out: batches.append(len(out)))
    with tgate_v2.apply(pipe, config):
        family.run(pipe, steps=steps, **setting)
    kinds = [{tuple(list(each.values())[kind]) for each in found} for kind in (0, 1)]
    assert len(kinds[0]) == len(kinds[1]) == 1
    return *(list(kind.pop()) for kind in kinds), batches


# the worked schedules of 25 steps: those of SDXL and PixArt
@pytest.mark.parametrize("gate, k, computed", [(10, 5, [0, 1, 2, 5, *range(9, 25)]),
                                               (15, 3, [0, 1, 2, 3, 6, 9, 12, *range(14, 25)])])
def test_schedule_of_self_attention(gate, k, computed):
    config = Config(gate=gate, sp_interval=k)
    assert [i for i in range(25) if tgate_v2.computes(i, config)] == computed
    assert ran(FAMILIES["pixart"], config, 25)[0] == computed


@pytest.mark.parametrize("name", CROSSED)
def test_cross_attention_computes_up_to_the_gate_and_the_batch_halves_there(name):
    own, cross, batches = ran(FAMILIES[name], Config(gate=3, sp_interval=1, fi_interval=2), 8)
    assert cross == [0, 1, 2] and own == [0, 1, 2, 4, 6]           # at the gate itself the mean of the step before is used
    assert batches[0] % 2 == 0 and batches == [batches[0]] * 3 + [batches[0] // 2] * 5


def test_f_is_counted_from_the_start_of_the_run():
    computed = {gate: [i for i in range(10) if tgate_v2.computes(i, Config(gate=gate, sp_interval=1, fi_interval=3))]
                for gate in (3, 4, 5)}
    assert computed == {3: [0, 1, 2, 3, 6, 9], 4: [0, 1, 2, 3, 6, 9], 5: [0, 1, 2, 3, 4, 6, 9]}


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("config", [Config(gate=4, sp_interval=1), Config(gate=9, sp_interval=1, fi_interval=3)])
def test_a_gate_at_the_end_is_the_plain_run(name, config):
    family = FAMILIES[name]
    pipe = family.pipe()
    with tgate_v2.apply(pipe, config) as patch:
        assert torch.equal(family.run(pipe, steps=4), contract.plain(name, steps=4))
        assert patch.report()["state"] == "no gain" and "before any attention is reused" in patch.report()["reason"]


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("batch", [1, 2])
def test_from_the_gate_on_cross_attention_gives_the_mean_of_what_it_gave_before(name, batch):
    family = FAMILIES[name]
    pipe, gave = family.pipe(), []
    block = next(block for block in describe(family.model(pipe)).blocks if block.cross is not None)
    block.cross.register_forward_hook(lambda m, args, out: gave.append(out))
    with tgate_v2.apply(pipe, Config(gate=2, sp_interval=1)):
        family.run(pipe, steps=5, batch=batch)
    null, cond = gave[1].chunk(2)
    assert len(gave) == 5 and not torch.equal(null, cond)
    assert all(torch.equal(out, (null + cond) / 2) for out in gave[2:])


def test_what_is_left_from_the_gate_on_is_the_null_prompt():
    """SDXL adds conditions of each prompt to its timestep."""
    family = FAMILIES["sdxl"]
    pipe, added = family.pipe(), []
    pipe.unet.add_embedding.register_forward_pre_hook(lambda m, args: added.append(args[0]))
    with tgate_v2.apply(pipe, Config(gate=2, sp_interval=1)):
        family.run(pipe, steps=4, batch=2)
    null, cond = added[0].chunk(2)
    assert not torch.equal(null, cond)
    assert torch.equal(added[1], added[0]) and torch.equal(added[2], null) and torch.equal(added[3], null)


def test_before_the_gate_self_attention_gives_what_it_last_computed():
    family = FAMILIES["unet"]
    pipe, gave = family.pipe(), []
    describe(pipe.unet).blocks[0].attn.register_forward_hook(lambda m, args, out: gave.append(out))
    with tgate_v2.apply(pipe, Config(gate=9, sp_interval=3, warm_up=1)):
        family.run(pipe, steps=8)
    source = [0, 1, 1, 3, 3, 3, 6, 6]
    assert all(torch.equal(gave[i], gave[source[i]]) for i in range(8))
    assert all(not torch.equal(gave[i], gave[i - 1]) for i in (1, 3, 6))


def draw(pipe, text, null, guidance, steps=6, **more):
    """Latents of a UNet pipeline for embedded prompts (B, words, width), one seed for each."""
    generator = [torch.Generator().manual_seed(i) for i in range(len(text))]
    return pipe(prompt_embeds=text, negative_prompt_embeds=null, guidance_scale=guidance, num_inference_steps=steps, height=32,
                width=48, output_type="latent", generator=generator, **more).images


def test_the_scale_of_guidance_does_not_matter_from_the_gate_on():
    """A latent put in behind the last guided step ends where it does under any other scale."""
    outs, plain = [], []
    for scale in (3.0, 9.0):
        pipe = FAMILIES["unet"].pipe()
        setting = dict(steps=5, callback_on_step_end=lambda pipe, i, t, given: {
            "latents": torch.ones_like(given["latents"]) if i == 0 else given["latents"]})
        texts = torch.randn(2, 1, 5, WIDTH, generator=torch.Generator().manual_seed(3))
        plain.append(draw(pipe, *texts, scale, **setting))
        with tgate_v2.apply(pipe, Config(gate=1)):
            outs.append(draw(pipe, *texts, scale, **setting))
    assert torch.equal(*outs) and not torch.equal(*plain)


def test_where_both_prompts_are_one_the_gate_only_freezes():
    """The mean of equal halves is either of them: the run is that without guidance."""
    text, outs = torch.randn(1, 5, WIDTH), []
    for guidance in (3.0, 1.0):
        pipe = FAMILIES["unet"].pipe()
        with tgate_v2.apply(pipe, Config(gate=2, sp_interval=2, warm_up=0)) as patch:
            outs.append(draw(pipe, text, text, guidance))
            assert patch.counts["halved"] == (4 if guidance > 1 else 0)
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-4)


def test_two_prompts_without_guidance_are_not_mixed():
    texts, outs = torch.randn(2, 5, WIDTH), []
    for rows in (texts, texts[:1]):
        pipe = FAMILIES["unet"].pipe()
        with tgate_v2.apply(pipe, Config(gate=2, sp_interval=2, warm_up=0)):
            outs.append(draw(pipe, rows, rows, 1.0))
    torch.testing.assert_close(outs[0][:1], outs[1], atol=1e-3, rtol=1e-4)


def test_with_deepcache_the_first_half_batch_is_a_full_step():
    family = FAMILIES["unet"]
    pipe, seen = family.pipe(), []
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda m, args, out: seen.append(len(out)))
    with tgate_v2.apply(pipe, Config(gate=4, sp_interval=1, warm_up=0)), deepcache.apply(pipe, deepcache.Config(interval=3)):
        out = family.run(pipe, steps=9)
    assert seen == [2, 2, 1, 1] and out.isfinite().all()           # steps 0 and 3; 4, with nothing kept yet, and 6


@pytest.mark.parametrize("wrong, named", [({"gate": 0}, "gate=0"), ({"sp_interval": 0}, "sp_interval=0"),
                                          ({"fi_interval": 0}, "fi_interval=0"), ({"warm_up": -1}, "warm_up=-1")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "cogvideox"])
def test_a_model_without_cross_attention_is_refused(name):
    pipe = FAMILIES[name].pipe()
    with pytest.raises(ValueError, match="has no cross-attention"):
        tgate_v2.apply(pipe)
    assert "_patch_site" not in vars(Family.model(pipe))


class Official:
    """A pipeline whose call is that of the released package."""

    def __init__(self, pipe, loader, config):
        loader(pipe)
        self.pipe, self.config = pipe, config
        setattr(self, "unet" if hasattr(pipe, "unet") else "transformer", Family.model(pipe))

    def __call__(self, **setting):
        config = self.config
        return self.pipe.tgate(**setting, gate_step=config.gate, sp_interval=config.sp_interval,
                               fi_interval=config.fi_interval, warm_up=config.warm_up)


@pytest.mark.parametrize("config", [Config(gate=4, sp_interval=3, fi_interval=2, warm_up=1), Config(gate=1, sp_interval=1)])
@pytest.mark.parametrize("name, loader", [("unet", "TgateSDLoader"), ("sdxl", "TgateSDXLLoader"),
                                          ("pixart", "TgatePixArtAlphaLoader")])
def test_equals_the_official_package(name, loader, config):
    package = pytest.importorskip("tgate")
    family, setting = FAMILIES[name], dict(steps=9, size=(40, 24), batch=2)
    pipe = family.pipe()
    with tgate_v2.apply(pipe, config):
        ours = family.run(pipe, **setting)
    assert torch.equal(ours, family.run(Official(family.pipe(), getattr(package, loader), config), **setting))
