import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family
from sequential import in_two_calls

from methods import adacache
from methods._core.denoiser import describe
from methods.adacache import CODEBOOKS, Config

CHAINED = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]
BOOK = ((0.01, 5), (0.5, 4), (0.95, 3), (1.25, 2), (2.0, 1))


@pytest.mark.parametrize("check, case", contract.cases(adacache, adacache.TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


# ---- the equations ----------------------------------------------------------------------------------------------------

def l1(x):
    return sum(abs(float(value)) for value in x.flatten())


def test_the_change_by_a_loop():
    old, new = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    expected = l1(old - new) / l1(old) / 4
    assert adacache.change(adacache.norms(new, old)[None], 4) == pytest.approx(expected, rel=1e-6)
    assert adacache.change(adacache.norms(new * 7, old * 7)[None], 4) == pytest.approx(expected, rel=1e-6)
    assert adacache.change(adacache.norms(1.5 * old, old)[None], 4) == pytest.approx(0.5 / 4, rel=1e-6)
    two = torch.stack([adacache.norms(new, old), adacache.norms(1.5 * old, old)])           # a mean over monitored blocks
    assert adacache.change(two, 4) == pytest.approx((expected + 0.125) / 2, rel=1e-6)


def test_calls_of_one_step_count_as_one_batch():
    old, new = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    parts = adacache.norms(new[:2], old[:2]) + adacache.norms(new[2:], old[2:])
    torch.testing.assert_close(parts, adacache.norms(new, old))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_motion_by_a_loop(stride):
    r = torch.randn(2, 5, 4, 3)
    later = [frame for i in range(2) for frame in r[i, stride:]]
    earlier = [frame for i in range(2) for frame in r[i, :5 - stride]]
    expected = [sum(l1(a - b) for a, b in zip(later, earlier, strict=True)), sum(map(l1, later)) + sum(map(l1, earlier))]
    assert adacache.frame_norms(r, stride).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("raw, m", [(0.385, 1.0), (0.30, 0.136), (0.45, 3.48)])
def test_motion_factors_of_the_paper(raw, m):
    for shares in ([raw], [raw - 0.1, raw + 0.1]):                                          # of one stride, of two
        sums = torch.tensor([[share, 1.0] for share in shares], dtype=torch.float64)
        assert adacache.motion(sums) == pytest.approx(m, rel=5e-3)


def test_a_still_video_has_no_motion():
    frames = adacache.frame_norms(torch.ones(1, 6, 4, 3), 1)[None]
    assert adacache.motion(frames) == 0
    assert adacache.regularised(0.2, 0.0, 1.0, 4, 10) == pytest.approx(0.2 * 10 / 4)         # the first time, m' being 1
    assert adacache.regularised(0.2, 0.0, 0.0, 4, 10) == 0


def test_a_change_at_a_threshold_falls_into_the_next_bin():
    book = CODEBOOKS["long"]
    assert [adacache.rate(c, book) for c in (0.0, 0.03, 0.0499, 0.05, 0.11, 2.0, float("nan"))] == [12, 10, 10, 8, 3, 3, 3]


def test_a_codebook_of_even_quantiles():
    book = adacache.codebook([0.1 * n for n in range(1, 11)], (4, 2))
    assert [adacache.rate(0.1 * n, book) for n in range(1, 11)] == [4] * 5 + [2] * 5


# ---- the schedule -----------------------------------------------------------------------------------------------------

def computed(family, pipe, steps, config, **setting):
    """Numbers from 1 of the steps in which the blocks ran."""
    model, ran = Family.model(pipe), []
    model.register_forward_pre_hook(lambda *_: ran.append(False))
    describe(model).blocks[0].norm.register_forward_hook(lambda *_: ran.__setitem__(-1, True))
    with adacache.apply(pipe, config):
        family.run(pipe, steps=steps, **setting)
    return [k for k, each in enumerate(ran, start=1) if each]


def test_without_change_the_largest_rate_holds():
    pipe = FAMILIES["dit"].pipe(layers=1)
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda m, args: torch.ones_like(args[0]))
    pipe.transformer.transformer_blocks[0].attn1.to_out[0].weight.zero_()
    pipe.transformer.transformer_blocks[0].norm1.emb.timestep_embedder.linear_2.weight.zero_()    # the same gate at all times
    pipe.transformer.transformer_blocks[0].attn1.to_out[0].bias.fill_(1.0)
    found = computed(FAMILIES["dit"], pipe, 100, Config(codebook="long"))
    assert found == [1, 2, 14, 26, 38, 50, 62, 74, 86, 98, 99, 100]


@pytest.mark.parametrize("name", CHAINED)
def test_every_family_ends_with_two_computed_steps(name):
    family = FAMILIES[name]
    assert computed(family, family.pipe(), 9, Config(codebook=((1e9, 20),))) == [1, 2, 8, 9]


def by_hand(pipe, steps, book, monitored, window, strides, motion):
    """A second program for Latte, with counters of its own, two buffers a block and the sums of the official blocks."""
    model, kept, seen, state = pipe.transformer, {}, {}, {"k": 0, "next": 1, "rate": 1, "m": 1.0}
    pairs = [block for pair in zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True) for block in pair]

    def measure(changes, r):
        c = sum(changes) / len(changes)
        if motion:
            m = 1.0
            if window[0] <= state["k"] <= window[1]:
                shares = [l1(r[:, i:] - r[:, :-i]) / (l1(r[:, i:]) + l1(r[:, :-i])) for i in strides]
                m = (sum(shares) / len(shares) / 0.385) ** 8
            c *= m + abs(10 * (m - state["m"]) / state["rate"])
            state["m"] = m
        state["new"] = next((rate for threshold, rate in book if c < threshold), book[-1][1])

    def wrap(place, block, forward):
        def run(x, *args, **kwargs):
            if place == 0:
                state["k"] += 1
                state["active"] = state["k"] in (1, state["next"], steps - 1, steps)
                state["changes"], state["new"] = [], state["rate"]
            if not state["active"]:
                return (x + kept[place][0]) + kept[place][1]
            between = []
            handle = (block.attn2 or block.norm2).register_forward_pre_hook(lambda m, inputs: between.append(inputs[0]))
            out = forward(x, *args, **kwargs)
            handle.remove()
            attention = between[0] - x
            if place % 2 and place // 2 in monitored:
                if place in seen:
                    state["changes"].append(l1(seen[place] - attention) / l1(seen[place]) / state["rate"])
                    if place // 2 == monitored[-1]:
                        measure(state["changes"], attention)
                seen[place] = attention
            kept[place] = attention, out - between[0]
            if place == len(pairs) - 1:
                state["rate"] = state["new"]
                state["next"] = state["k"] + state["rate"]
            return out
        return run
    for place, block in enumerate(pairs):
        block.forward = wrap(place, block, block.forward)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("steps, layers, setting", [
    (12, 3, dict(monitored=(1,))), (9, 2, dict(monitored=(0, 1))),
    (14, 3, dict(monitored=(1,), motion=True)), (11, 2, dict(monitored=(0, 1), motion=True, window=(2, 6), strides=(1, 2)))])
def test_whole_runs_equal_a_program_by_hand(steps, layers, setting):
    family, config = FAMILIES["latte"], Config(codebook=BOOK, **setting)
    for size in family.sizes:
        pipe, other = (family.pipe(layers=layers) for _ in range(2))
        pipe.transformer.double()
        other.transformer.double()
        with adacache.apply(pipe, config) as patch:
            ours = family.run(pipe, steps=steps, size=size)
            assert 0 < patch.report()["reused"] < steps
        by_hand(other, steps, BOOK, config.monitored, config.window, config.strides, config.motion)
        torch.testing.assert_close(ours, family.run(other, steps=steps, size=size), atol=1e-9, rtol=1e-9)


def test_the_middle_block_is_monitored():
    for layers, middle in ((3, 1), (4, 1), (28, 13)):
        assert (layers - 1) // 2 == middle
        if layers < 28:
            runs = []
            for monitored in ((), (middle,)):
                pipe = FAMILIES["latte"].pipe(layers=layers)
                with adacache.apply(pipe, Config(codebook=BOOK, monitored=monitored)):
                    runs.append(FAMILIES["latte"].run(pipe, steps=8))
            assert torch.equal(*runs)


@pytest.mark.parametrize("name, motion", [("dit", False), ("latte", True), ("cogvideox", True)])
def test_guidance_in_two_calls_gives_the_same(name, motion):
    family, outs, reports = FAMILIES[name], [], []
    book = adacache.TINY.codebook if name == "dit" else ((0.1, 4), (1.0, 2), (5.0, 3))
    for twice in (False, True):
        pipe = family.pipe()
        Family.model(pipe).double()
        with adacache.apply(pipe, Config(codebook=book, motion=motion, window=(2, 8))) as patch:
            if twice:
                in_two_calls(pipe)
            outs.append(family.run(pipe, steps=10))
            reports.append(patch.report())
    assert reports[1]["computed"] == 2 * reports[0]["computed"] and reports[0]["reused"] > 0
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CHAINED)
def test_observing_changes_nothing(name):
    family, changes = FAMILIES[name], []
    pipe = family.pipe()
    with adacache.observe(pipe, changes) as patch:
        assert torch.equal(family.run(pipe, steps=5), family.run(family.pipe(), steps=5))
        assert patch.report()["computed"] == 5
    assert len(changes) == 4 and all(0 < c < 10 for c in changes)


def test_what_is_kept_of_a_lost_cache_is_not_used():
    """Without room for what blocks add, every step computes, and the schedule is still that of the codebook."""
    pipe = FAMILIES["dit"].pipe()
    with adacache.apply(pipe, Config(codebook=((1e9, 3),))) as patch:
        FAMILIES["dit"].run(pipe, steps=9)
        kept = patch.report()["cached_bytes"]
        patch.limit(bytes=kept // 2)
        out = FAMILIES["dit"].run(pipe, steps=9)
        assert patch.report()["state"] == "no gain" and "does not fit" in patch.report()["reason"]
    assert torch.equal(out, FAMILIES["dit"].run(FAMILIES["dit"].pipe(), steps=9))


@pytest.mark.parametrize("wrong, named", [
    ({"codebook": "quick"}, "codebook='quick'"), ({"codebook": ()}, "must be pairs"), ({"codebook": ((0.1, 0),)}, "at least 1"),
    ({"codebook": ((0.2, 3), (0.1, 2))}, "rising"), ({"strides": (0,)}, "strides=")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    pipe = FAMILIES["dit"].pipe()
    with pytest.raises(ValueError, match="draws none"):
        adacache.apply(pipe, Config(motion=True))
    with pytest.raises(ValueError, match=r"monitored=\(3,\)"):
        adacache.apply(pipe, Config(monitored=(3,)))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        adacache.apply(pipe.transformer)
    with pytest.raises(ValueError, match="on a UNet use deepcache"):
        adacache.apply(FAMILIES["unet"].pipe())
