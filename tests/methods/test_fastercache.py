import math

import pytest
import torch
import two_calls
from contracts import patch as contract
from families import FAMILIES, Family

from methods import fastercache
from methods._core.denoiser import describe
from methods.fastercache import Config

LATTE = Config(attention_interval=2, attention_offset=1, attention_start=0.3, weight=(0.5, 0.5), low_until=0.88, high_from=0.88)
OPEN_SORA = Config(start=11 / 30, attention_interval=2, attention_offset=1, attention_start=7 / 30, weight=(0.045, 1.035))
PLAN = Config(interval=6, start=39 / 150, attention_start=44 / 150)                            # Open-Sora-Plan


@pytest.mark.parametrize("check, case", contract.cases(fastercache, fastercache.Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("config, steps, alone", [(OPEN_SORA, 30, 15), (LATTE, 50, 26), (Config(), 50, 26), (PLAN, 150, 92)])
def test_steps_of_the_conditional_branch_alone(config, steps, alone):
    """The counts of the official settings for Open-Sora, Latte, CogVideoX and Open-Sora-Plan."""
    assert sum(fastercache.shares_guidance(i, steps, config) for i in range(steps)) == alone


def test_the_schedules_of_the_official_code():
    """By its counter k = i + 1: CogVideoX without guidance if k >= 18 and 5 does not divide k, low band boosted to 40, high
    band from 30; attention left out from 18 on if 3 does not divide k. Latte: from 16 on if k is even, bands change at 45."""
    for i, k in enumerate(range(1, 51)):
        alone = k >= 18 and k % 5 > 0
        assert fastercache.shares_guidance(i, 50, Config()) == fastercache.shares_guidance(i, 50, LATTE) == alone
        assert fastercache.factors(i, 50, Config()) == (1.1 if k <= 40 else 1, 1.1 if k >= 30 else 1)
        assert fastercache.factors(i, 50, LATTE) == (1.1 if k < 45 else 1, 1.1 if k >= 45 else 1)
        late_and_full = k >= 18 and k % 5 == 0
        assert fastercache.computes(i, 50, Config()) == (k < 18 or k % 3 == 0 or late_and_full)
        assert fastercache.computes(i, 50, LATTE) == (k < 16 or k % 2 == 1 or late_and_full)
        assert fastercache.computes(i, 50, LATTE, guided=False) == (k < 16 or k % 2 == 1)
    for k in range(8, 31):
        assert fastercache.weight_of(k - 1, 30, OPEN_SORA) == pytest.approx(0.9 * (k - 7) / 20)


def disk(height, width):
    """The low band by hand, over the frequencies of a spectrum in the order of `fft2`."""
    def signed(n, size):
        return n if n < size - size // 2 else n - size
    r = min(height, width) // 5
    return [[signed(y, height) ** 2 + signed(x, width) ** 2 <= r * r for x in range(width)] for y in range(height)]


@pytest.mark.parametrize("height, width", [(8, 8), (7, 9), (12, 5), (4, 3), (16, 10)])
def test_bands_part_the_spectrum(height, width):
    assert fastercache.low_pass(height, width).tolist() == disk(height, width)
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    low, high = fastercache.bands(x)
    torch.testing.assert_close(torch.fft.ifft2(low + high).real, x, atol=1e-5, rtol=1e-5)
    wave = 2 * math.pi * torch.arange(width) / width
    spectrum = sum(x[0, 0, a, b] * torch.exp(-1j * (2 * math.pi * a / height + 2 * wave[b])) for a in range(height)
                   for b in range(width))
    torch.testing.assert_close((low + high)[0, 0, 1, 2 % width], spectrum.to(torch.complex64), atol=1e-4, rtol=1e-4)


def test_a_radius_of_zero_keeps_the_mean_alone_and_a_constant_is_low():
    assert fastercache.low_pass(4, 4).nonzero().tolist() == [[0, 0]]
    low, high = fastercache.bands(torch.full((1, 1, 9, 11), 2.0))
    assert float(high.abs().max()) < 1e-5 and float(low.abs().sum()) == pytest.approx(2 * 9 * 11, rel=1e-5)


def test_a_constant_difference_is_rebuilt_exactly_and_grows_with_the_weight_of_the_low_band():
    """By 1.1 in each of three steps: the energy of the low band is 1.1^(2 k) times that kept."""
    cond = torch.randn(1, 2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    null = cond + torch.randn(cond.shape, generator=torch.Generator().manual_seed(1))
    kept = [a - b for a, b in zip(fastercache.bands(null), fastercache.bands(cond), strict=True)]
    later = torch.randn(cond.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(fastercache.rebuild(later, *kept), later + null - cond, atol=1e-4, rtol=1e-4)
    for k in (1, 2, 3):
        low, high = fastercache.bands(fastercache.rebuild(later, kept[0] * 1.1 ** k, kept[1]) - later)
        energy = float(low.abs().square().sum() / kept[0].abs().square().sum())
        assert energy == pytest.approx(1.1 ** (2 * k), rel=1e-4)
        torch.testing.assert_close(high, kept[1], atol=1e-3, rtol=1e-3)


def test_a_line_is_followed_exactly():
    """Computed in every second step, at w = 0.5 the skipped value of a line is exact; at w = 0 it is the last."""
    a, b = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(fastercache.extrapolate(a, a + 2 * b, 0.5), a + 3 * b)
    assert torch.equal(fastercache.extrapolate(a, b, 0.0), b)


def by_hand(pipe, config, steps):
    """Another program over the parts of a batch (null, cond): a list of all computed outputs, cut to the conditional half
    where that runs alone, and guidance rebuilt from plain Fourier transforms."""
    model, at, kept = Family.model(pipe), {"step": -1}, {}
    plain = model.forward

    def attention(forward):
        history = []

        def run(*args, **kwargs):
            i = at["step"]
            if not fastercache.computes(i, steps, config):
                parts = []
                for before, last in zip(*history[-2:], strict=True):
                    before, last = (x.chunk(2)[1] if at["alone"] and two else x
                                    for x, two in ((before, history_two[-2]), (last, history_two[-1])))
                    parts.append(last + (last - before) * fastercache.weight_of(i, steps, config))
                return tuple(parts) if len(parts) > 1 else parts[0]
            out = forward(*args, **kwargs)
            history.append(out if isinstance(out, tuple) else (out,))
            history_two.append(not at["alone"])
            return out
        history_two = []
        return run

    def conditional(x, batch):
        if isinstance(x, dict):
            return {key: conditional(value, batch) for key, value in x.items()}
        return x[batch // 2:] if torch.is_tensor(x) and x.ndim and len(x) == batch else x

    def run(*args, **kwargs):
        at["step"] += 1
        i, batch = at["step"], len((*args, *kwargs.values())[0])
        at["alone"] = fastercache.shares_guidance(i, steps, config)
        if not at["alone"]:
            out = plain(*args, **kwargs)
            null, cond = (torch.fft.fft2(half.float()) for half in out[0].chunk(2))
            kept["delta"] = null - cond
            return out
        out = plain(*(conditional(x, batch) for x in args), **conditional(kwargs, batch))
        low = torch.tensor(disk(*out[0].shape[-2:]))
        a, b = fastercache.factors(i, steps, config)
        kept["delta"] = torch.where(low, kept["delta"] * a, kept["delta"] * b)
        null = torch.fft.ifft2(torch.fft.fft2(out[0].float()) + kept["delta"]).real.to(out[0].dtype)
        both = torch.cat([null, out[0]])
        if isinstance(out, tuple):
            return (both,)
        out.sample = both
        return out

    for block in describe(model).blocks:
        for module in block.self_attentions:
            module.forward = attention(module.forward)
    model.forward = run
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "sdxl", "pixart", "sd3", "latte", "cogvideox"])
@pytest.mark.parametrize("config, steps", [(Config(weight=(0.1, 0.9)), 13), (LATTE, 11), (Config(interval=3, start=0.4), 10)])
def test_whole_runs_equal_a_program_by_hand(name, config, steps):
    family, setting = FAMILIES[name], dict(steps=steps, seed=4, size=FAMILIES[name].sizes[1], batch=2)
    pipe = family.pipe()
    with fastercache.apply(pipe, config) as patch:
        ours = family.run(pipe, **setting)
        assert patch.report()["alone"] > 2 and patch.report()["reused"] > 2
    theirs = family.run(by_hand(family.pipe(), config, steps), **setting)
    torch.testing.assert_close(ours, theirs, atol=2e-4 * float(theirs.abs().max()), rtol=0)
    assert (ours - theirs).abs().max() < 0.02 * (ours - family.run(family.pipe(), **setting)).abs().max()


def test_the_batch_halves_and_what_is_given_is_the_conditional_half():
    """DiT puts the conditional half first, PixArt last."""
    for name, half in (("dit", 0), ("pixart", 1)):
        pipe, gave = FAMILIES[name].pipe(), []
        pipe.transformer.transformer_blocks[0].attn1.register_forward_hook(lambda m, args, out, gave=gave: gave.append(out))
        with fastercache.apply(pipe, Config(start=0.4, attention_start=0.4, weight=(0.5, 0.5))):
            FAMILIES[name].run(pipe, steps=5, batch=2)             # k = 3 and 4 run alone; 4 does not compute
        assert [len(out) for out in gave] == [4, 4, 2, 2, 4]
        before, last = gave[1].chunk(2)[half], gave[2]
        assert torch.equal(gave[3], last + (last - before) * 0.5)


def test_with_a_scale_of_one_the_branch_left_out_does_not_matter():
    outs = []
    for low in (1.0, 5.0):
        pipe = FAMILIES["cogvideox"].pipe()
        with fastercache.apply(pipe, Config(low=low, attention_interval=1)) as patch:
            outs.append(FAMILIES["cogvideox"].run(pipe, steps=6, guidance=1.0 + 1e-9))
            assert patch.report()["alone"] > 0
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("config", [Config(), LATTE, Config(attention_interval=1), Config(interval=1)])
@pytest.mark.parametrize("name", ["dit", "cogvideox"])
def test_guidance_in_two_calls_gives_the_same_as_in_one(name, config):
    (one, first), (two, second) = two_calls.both(fastercache, config, name)
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    assert first.get("alone") == second.get("alone") and first["saved"] == second["saved"] > 0
    assert not torch.allclose(one, two_calls.Sampler(name, 1)(), atol=1e-3)


def test_packed_latents_are_laid_out_as_an_image():
    """Flux with guidance in two calls: 4 x 6 patches."""
    pipe, more = FAMILIES["flux"].pipe(), []
    null = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(9))
    for config in (Config(attention_interval=1, low=1.0, high=1.0), None):
        setting = dict(steps=8, size=(32, 48), true_cfg_scale=2.0, negative_prompt_embeds=null,
                       negative_pooled_prompt_embeds=null[:, 0])
        if config is None:
            more.append(FAMILIES["flux"].run(pipe, **setting))
            continue
        with fastercache.apply(pipe, config) as patch:
            more.append(FAMILIES["flux"].run(pipe, **setting))
            assert patch.report()["alone"] == 4
    assert not torch.equal(*more) and (more[0] - more[1]).abs().max() < 0.5 * more[1].abs().max()


def test_without_guidance_attention_alone_is_reused():
    pipe = FAMILIES["flux"].pipe()
    with fastercache.apply(pipe, Config()) as patch:
        FAMILIES["flux"].run(pipe, steps=10)
        report = patch.report()
    skipped = [i for i in range(10) if not fastercache.computes(i, 10, Config(), guided=False)]
    assert report["reused"] == 4 * len(skipped) and "alone" not in report


@pytest.mark.parametrize("wrong, named", [({"interval": 0}, "interval=0"), ({"attention_interval": 0}, "attention_interval=0"),
                                          ({"start": 1.5}, "start=1.5"), ({"attention_start": -0.1}, "attention_start=-0.1"),
                                          ({"low_until": 2.0}, "low_until=2.0"), ({"high_from": -1.0}, "high_from=-1.0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_a_bare_model_is_refused():
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        fastercache.apply(FAMILIES["dit"].pipe().transformer)
