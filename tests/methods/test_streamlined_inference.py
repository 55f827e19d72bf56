import pytest
import torch
from contracts import patch as contract
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from families import FAMILIES
from sequential import in_two_calls

from accel_tools.measure.memory import peak_allocated
from methods import streamlined_inference
from methods._core.denoiser import describe
from methods.streamlined_inference import Config, in_slices

LATTE, COGVIDEOX = FAMILIES["latte"], FAMILIES["cogvideox"]
SLICED = Config(full=1.0)


@pytest.mark.parametrize("check, case", contract.cases(streamlined_inference, Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


# ---- the slicer -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, chunks, sizes", [(14, 4, [4, 4, 4, 2]), (16, 8, [2] * 8), (14, 7, [2] * 7), (5, 1, [5]),
                                              (3, 8, [1, 1, 1]), (10, 6, [2] * 5)])
def test_slices(n, chunks, sizes):
    parts = streamlined_inference.slices(n, chunks)
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(n)[part]] == list(range(n))


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 14])
def test_a_layer_within_frames_may_be_sliced_along_them(chunks):
    torch.manual_seed(0)
    layer = ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=8, groups=4).double()
    x, time = torch.randn(14, 16, 6, 10, dtype=torch.float64), torch.randn(14, 8, dtype=torch.float64)
    found = in_slices(layer.forward, chunks, 0, x, time)
    torch.testing.assert_close(found, layer(x, time), atol=1e-12, rtol=1e-12)
    assert chunks > 1 or torch.equal(found, layer(x, time))


def test_a_layer_between_frames_may_be_sliced_along_places_unless_its_norm_spans_them():
    torch.manual_seed(0)
    block = TemporalBasicTransformerBlock(16, 16, 2, 8).double()
    x = torch.randn(30, 7, 16, dtype=torch.float64)                       # 5 x 6 places, 7 frames
    body = block.attn1                                                    # its own forward moves the frames about
    torch.testing.assert_close(in_slices(body.forward, 4, 0, x), body(x), atol=1e-12, rtol=1e-12)
    layer = TemporalResnetBlock(32, 32, temb_channels=None).double()
    video = torch.randn(2, 32, 7, 5, 6, dtype=torch.float64) + torch.linspace(0, 9, 6, dtype=torch.float64)
    whole, cut = layer(video, None), torch.cat([layer(part, None) for part in video.split(2, -1)], -1)
    assert (whole - cut).abs().max() > 0.1                                # what the official code does to its group norms


# ---- whole runs -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [SLICED, Config(full=1.0, temporal_chunks=3, spatial_chunks=1),
                                    Config(full=1.0, temporal_chunks=1, spatial_chunks=5)])
@pytest.mark.parametrize("size", LATTE.sizes)
def test_slices_change_nothing(config, size):
    outs, calls = [], []
    for sliced in (False, True):
        pipe = LATTE.pipe()
        pipe.transformer.double()
        for block in (pipe.transformer.transformer_blocks[0], pipe.transformer.temporal_transformer_blocks[1]):
            block.ff.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
        with streamlined_inference.apply(pipe, config if sliced else streamlined_inference.OFF):
            outs.append(LATTE.run(pipe, steps=3, size=size, batch=3))
    torch.testing.assert_close(*outs, atol=1e-9, rtol=1e-9)
    places = size[0] * size[1] // 16
    expected = [[n for n in (24, 6 * places)],
                [part.stop - part.start for n, chunks in ((24, config.temporal_chunks), (6 * places, config.spatial_chunks))
                 for part in streamlined_inference.slices(n, chunks)]]
    assert calls == expected[0] * 3 + expected[1] * 3


@pytest.mark.parametrize("size", COGVIDEOX.sizes)
def test_samples_and_tokens_are_sliced_under_joint_attention(size):
    outs, calls = [], []
    for config in (streamlined_inference.OFF, Config(full=1.0, temporal_chunks=3, spatial_chunks=4)):
        pipe = COGVIDEOX.pipe()
        pipe.transformer.double()
        block = pipe.transformer.transformer_blocks[1]
        block.attn1.to_q.register_forward_hook(lambda m, args, out: calls.append(len(out)))
        block.ff.net[0].register_forward_hook(lambda m, args, out: calls.append(tuple(out.shape[:2])))
        with streamlined_inference.apply(pipe, config):
            outs.append(COGVIDEOX.run(pipe, steps=2, size=size, batch=2))
    torch.testing.assert_close(*outs, atol=1e-9, rtol=1e-9)
    tokens = 5 + 3 * size[0] * size[1] // 256
    pieces = [part.stop - part.start for part in streamlined_inference.slices(tokens, 4)]
    assert calls == [4, (4, tokens)] * 2 + [2, *((2, n) for n in pieces)] * 4


@pytest.mark.parametrize("family, size, share", [(LATTE, (64, 128), 0.6), (COGVIDEOX, (128, 192), 0.6)])
def test_the_peak_of_memory_falls(family, size, share):
    """Of a run on many tokens, whose largest part is what layers make on the way."""
    peaks = []
    for config in (streamlined_inference.OFF, SLICED, Config()):
        pipe = family.pipe()
        with streamlined_inference.apply(pipe, config):
            peaks.append(peak_allocated(lambda pipe=pipe: family.run(pipe, steps=2, size=size, batch=2)))
    assert peaks[1] < share * peaks[0] and peaks[1] <= peaks[2] < (share + 0.15) * peaks[0]


@pytest.mark.parametrize("chunks, share", [(2, 0.5), (4, 0.25), (8, 0.125)])
def test_what_a_group_holds_at_one_time(chunks, share):
    """The output, and of what is made on the way the share of a slice."""
    block = describe(LATTE.pipe().transformer).blocks[1].module
    x, time = torch.randn(512, 8, 32), torch.randn(512, 6 * 32)
    with torch.no_grad():
        whole = peak_allocated(lambda: block(x, timestep=time))
        found = peak_allocated(lambda: in_slices(block.forward, chunks, 0, x, timestep=time))
    out = x.numel() * 4
    assert out + (whole - out) * share * 0.8 < found < out + (whole + out) * share * 1.2


# ---- Step Rehash ------------------------------------------------------------------------------------------------------

def test_which_steps_run_whole():
    assert sorted(streamlined_inference.evenly(25, 13 / 25)) == list(range(0, 25, 2))
    assert streamlined_inference.evenly(8, 0.5) == {0, 2, 4, 6} and streamlined_inference.evenly(5, 1.0) == set(range(5))
    for steps in range(1, 40):
        for share in (0.05, 0.3, 0.52, 0.9):
            found = streamlined_inference.evenly(steps, share)
            assert len(found) == -(-steps * round(share * 100) // 100) and 0 in found and max(found) < steps
    assert streamlined_inference.least_similar([.9, .2, .8, .5], 3) == (0, 2, 4)
    assert streamlined_inference.least_similar([.9, .2], 3) == (0, 1, 2)


def by_hand(pipe, whole, late):
    """Latte whose blocks up to number `late` run in the steps `whole` only."""
    model, kept, step = pipe.transformer, {}, [-1]
    pairs = [block for pair in zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True) for block in pair]

    def wrap(place, forward):
        def run(x, *args, **kwargs):
            step[0] += place == 0
            if step[0] in whole:
                out = forward(x, *args, **kwargs)
                kept.update({late: out} if place == late else {})
                return out
            return kept[late] if place == late else x
        return run
    for place, block in enumerate(pairs[:late + 1]):
        block.forward = wrap(place, block.forward)
    return pipe


@pytest.mark.parametrize("config, whole, late", [
    (dict(full=0.5), {0, 2, 4}, 3), (dict(full=(0, 3)), {0, 3}, 3), (dict(full=(0, 1, 4), depth=0.4), {0, 1, 4}, 1),
    (dict(full=0.3, depth=1.0), {0, 3}, 5)])
def test_whole_runs_equal_a_program_by_hand(config, whole, late):
    for size in LATTE.sizes:
        pipe = LATTE.pipe(layers=3)
        with streamlined_inference.apply(pipe, Config(temporal_chunks=1, spatial_chunks=1, **config)) as patch:
            ours = LATTE.run(pipe, steps=6, size=size, batch=2)
            assert patch.report()["skipped"] == (late + 1) * (6 - len(whole))
        assert torch.equal(ours, LATTE.run(by_hand(LATTE.pipe(layers=3), whole, late), steps=6, size=size, batch=2))


def test_the_same_call_again_gives_the_same():
    model = LATTE.pipe().transformer
    x, text = torch.randn(1, 4, 4, 16, 16), torch.randn(1, 5, 16)
    with streamlined_inference.apply(model, Config(full=(0,))) as patch:
        outs = [model(x, torch.tensor([10]), text).sample for _ in range(2)]
        assert patch.counts["skipped"] == 2 and torch.equal(*outs)


def test_one_tensor_is_kept():
    pipe = LATTE.pipe()
    with streamlined_inference.apply(pipe, Config()) as patch:
        LATTE.run(pipe, steps=4)
        assert patch.report()["cached_bytes"] == 2 * 4 * 64 * 32 * 4


def test_similarities_are_observed():
    pipe, features, found = LATTE.pipe(layers=3), [], []
    pipe.transformer.temporal_transformer_blocks[1].register_forward_hook(lambda m, args, out: features.append(out.flatten()))
    with streamlined_inference.observe(pipe, found):
        assert torch.equal(LATTE.run(pipe, steps=5), LATTE.run(LATTE.pipe(layers=3), steps=5))
    expected = [float(a @ b / a.norm() / b.norm()) for a, b in zip(features, features[1:], strict=False)]
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 4


@pytest.mark.parametrize("family", [LATTE, COGVIDEOX], ids=lambda family: family.name)
def test_guidance_in_two_calls_gives_the_same(family):
    outs = []
    for twice in (False, True):
        pipe = family.pipe()
        pipe.transformer.double()
        with streamlined_inference.apply(pipe, Config()):
            if twice:
                in_two_calls(pipe)
            outs.append(family.run(pipe, steps=5))
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-6)


def test_under_joint_attention_both_streams_are_taken_up():
    pipe, seen = COGVIDEOX.pipe(), []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    COGVIDEOX.run(pipe, steps=1)
    handle.remove()
    with streamlined_inference.apply(pipe.transformer, Config(full=(0,))) as patch:
        outs = [pipe.transformer(**seen[0])[0] for _ in range(2)]
        assert patch.counts["skipped"] == 2 and torch.equal(*outs)


@pytest.mark.parametrize("wrong, named", [
    ({"temporal_chunks": 0}, "temporal_chunks=0"), ({"spatial_chunks": -1}, "spatial_chunks=-1"), ({"full": 0.0}, "full=0.0"),
    ({"depth": 1.5}, "depth=1.5")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    for name in ("unet", "dit", "flux"):
        with pytest.raises(ValueError, match="no blocks over the tokens of a video"):
            streamlined_inference.apply(FAMILIES[name].pipe())
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        streamlined_inference.apply(LATTE.pipe().transformer)
