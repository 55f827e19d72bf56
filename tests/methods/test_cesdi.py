import pytest
import torch
import torch.nn.functional as F
from contracts import patch as contract
from families import FAMILIES
from sequential import in_two_calls
from torch import nn

from accel_tools.measure.macs import count_macs
from methods import cesdi
from methods._core.denoiser import describe
from methods.cesdi import TINY, Config

UNET = FAMILIES["unet"]
PAIR = dict(batch=2, twins=True)


@pytest.mark.parametrize("check, case", contract.cases(cesdi, TINY), ids=contract.name)
def test_contract(check, case):
    check(case)


# ---- the mask ---------------------------------------------------------------------------------------------------------

def test_otsu_by_hand_and_by_a_loop():
    values = torch.tensor([0, 0, 0, 10, 10])
    threshold = cesdi.otsu(values)
    assert 0 <= threshold < 10 and (values > threshold).tolist() == [False] * 3 + [True] * 2
    for seed in range(10):
        random = torch.Generator().manual_seed(seed)
        values = torch.cat([torch.randint(0, 90, (40,), generator=random), torch.randint(60, 256, (20,), generator=random)])

        def apart(t, values=values):
            low, high = ([v for v in values.tolist() if (v <= t) == side] for side in (True, False))
            if not low or not high:
                return 0.0
            return len(low) * len(high) * (sum(low) / len(low) - sum(high) / len(high)) ** 2
        best = max(range(256), key=apart)
        assert apart(cesdi.otsu(values)) == pytest.approx(apart(best))


def test_the_difference_does_not_depend_on_the_scale():
    edit, original = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    d = cesdi.difference(edit, original)
    expected = torch.tensor([[sum(abs(float(edit[c, y, x] - original[c, y, x])) for c in range(4)) for x in range(5)]
                             for y in range(6)])
    torch.testing.assert_close(d, (expected - expected.min()) / (expected.max() - expected.min()))
    torch.testing.assert_close(cesdi.difference(3 * edit, 3 * original), d)
    assert not cesdi.difference(edit, edit).any()


def test_erosion_comes_before_dilation():
    """Single pixels go; what holds a square of 2 x 2 stays as it is."""
    mask = torch.zeros(8, 9, dtype=torch.bool)
    mask[1, 1] = mask[6, 2] = mask[5, 3] = True
    mask[3:6, 5:8] = True
    found = cesdi.opened(mask)

    def at(x, y, k, offset, of):
        here = [(y + dy, x + dx) for dy in offset for dx in offset]
        return of(k[i][j] for i, j in here if 0 <= i < 8 and 0 <= j < 9)
    eroded = [[at(x, y, mask.tolist(), (-1, 0), all) for x in range(9)] for y in range(8)]
    assert found.tolist() == [[at(x, y, eroded, (-1, 0), any) for x in range(9)] for y in range(8)]
    assert found.sum() == 9 and not found[1, 1]


def test_pooling_and_blocks():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = True
    assert cesdi.pooled(mask, (2, 2)).tolist() == [[True, False], [False, False]]
    mask = torch.zeros(96, 96, dtype=torch.bool)
    mask[24:48, 10:34] = True
    assert len(cesdi.blocks(mask, 2)) == 144 and 144 / 48 ** 2 == 0.0625
    odd = torch.zeros(5, 7, dtype=torch.bool)
    odd[4, 6] = True
    assert cesdi.blocks(odd, 2).tolist() == [[2, 3]]


# ---- the layers -------------------------------------------------------------------------------------------------------

CONVS = [dict(kernel_size=3, padding=1), dict(kernel_size=1), dict(kernel_size=3, padding=1, stride=2),
         dict(kernel_size=(3, 1), padding=(1, 0)), dict(kernel_size=3, padding=2, dilation=2), dict(kernel_size=3, padding=0)]


@pytest.mark.parametrize("shape", [(8, 8), (9, 7), (12, 5)])
@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_a_sparse_convolution_is_the_dense_one_where_it_is_computed(conv, side, shape):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, **conv).double()
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    dense = layer(x)
    base = torch.randn_like(dense)
    mask = torch.rand(dense.shape[2:]) < 0.2
    at = cesdi.blocks(mask, side)
    out = cesdi.sparse_conv(layer, x, base, at, side)
    active = torch.zeros(dense.shape[2:], dtype=torch.bool)
    for row, column in at.tolist():
        active[row * side:(row + 1) * side, column * side:(column + 1) * side] = True
    assert active[mask].all() and 0 < active.sum()
    torch.testing.assert_close(out[..., active], dense[..., active], atol=1e-12, rtol=1e-12)
    assert torch.equal(out[..., ~active], base[..., ~active])
    assert torch.equal(cesdi.sparse_conv(layer, x, base, at[:0], side), base)


def test_an_identity_kernel_gives_back_the_active_blocks():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    layer.weight.data.zero_()
    layer.weight.data[0, 0, 1, 1] = 1
    x = torch.randn(1, 1, 8, 8)
    out = cesdi.sparse_conv(layer, x, torch.zeros_like(x), torch.tensor([[0, 1], [3, 3]]), 2)
    expected = torch.zeros_like(x)
    expected[..., 0:2, 2:4], expected[..., 6:8, 6:8] = x[..., 0:2, 2:4], x[..., 6:8, 6:8]
    assert torch.equal(out, expected)


def test_what_a_sparse_convolution_costs():
    layer, x = nn.Conv2d(5, 7, 3, padding=1), torch.randn(1, 5, 32, 32)
    at = torch.tensor([[0, 0], [3, 4], [15, 15]])
    assert count_macs(lambda: cesdi.sparse_conv(layer, x, torch.zeros(1, 7, 32, 32), at, 2)) == 4 * 3 * 9 * 5 * 7


def test_a_norm_with_its_own_statistics_is_the_norm():
    norm = nn.GroupNorm(4, 12).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, other = torch.randn(2, 12, 5, 6, dtype=torch.float64), 3 + torch.randn(2, 12, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(cesdi.norm_like(norm, x, x), norm(x), atol=1e-5, rtol=1e-5)
    found = cesdi.norm_like(norm, other, x)
    assert (found - norm(other)).abs().max() > 1
    g = x[1].view(4, 3, 5, 6)[2]
    expected = (other[1, 7] - g.mean()) / (g.var(correction=0) + norm.eps).sqrt() * norm.weight[7] + norm.bias[7]
    torch.testing.assert_close(found[1, 7], expected, atol=1e-5, rtol=1e-5)


def test_the_merge_rate():
    editor = cesdi._Editor(Config(merge=0.9))
    editor.original, editor.edits = [0], [([1], torch.ones(1, 2, dtype=torch.bool))]
    layer = cesdi._Tokens(editor, torch.nn.Identity(), False)
    layer.index = [torch.tensor([1])]
    out = layer.around(lambda x: x, torch.tensor([[[1.0], [1.0]], [[5.0], [2.0]]]))
    assert out.flatten().tolist() == pytest.approx([1, 1, 1, 1.9])


# ---- whole runs -------------------------------------------------------------------------------------------------------

BOX = [[4 <= y < 9 and 6 <= x < 13 for x in range(16)] for y in range(16)]


def edited(config, pipe=None, **setting):
    pipe = pipe or UNET.pipe()
    with cesdi.apply(pipe, config) as patch:
        return UNET.run(pipe, **{"steps": 5} | PAIR | setting), patch.report()


def test_the_original_is_drawn_as_it_is():
    plain = UNET.run(UNET.pipe(), steps=5, **PAIR)
    for config in (TINY, Config(mask=BOX, conv_size=1, token_size=1)):
        out, report = edited(config)
        torch.testing.assert_close(out[0], plain[0], atol=1e-4, rtol=1e-4)
        assert (out[1] - plain[1]).abs().max() > 1e-3 and report["sparse"] > 0


def test_an_empty_mask_gives_the_original_again():
    out, report = edited(Config(mask=[[False] * 16] * 16, dense=0.0, conv_size=1, token_size=1))
    assert torch.equal(out[0], out[1]) and report["sparse"] == 5 and report["saved"] == 0.5


def test_a_full_mask_is_a_run_with_the_statistics_of_the_original():
    """Which differs from the plain run; with norms of its own it would be the plain run."""
    config = Config(mask=[[True] * 16] * 16, dense=0.0, conv_size=1, token_size=1, merge=1.0)
    plain = UNET.run(UNET.pipe(), steps=4, **PAIR)
    out, report = edited(config, steps=4)
    assert report["state"] == "no gain" and "all of each picture" in report["reason"] and not torch.equal(out[1], plain[1])
    real = cesdi.norm_like
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cesdi, "norm_like", lambda norm, x, original: real(norm, x, x))
        out, _ = edited(config, steps=4)
    torch.testing.assert_close(out, plain, atol=1e-3, rtol=1e-3)


def by_hand(pipe, mask, config, dense):
    """A UNet for two prompts with guidance, each layer computed whole, and put together under the mask, layer by layer."""
    unet, step = pipe.unet, [-1]
    original, edit = [0, 2], [1, 3]
    sparse = [False]

    def under(size):
        return F.adaptive_max_pool2d(mask[None].float(), size)[0] > 0.5

    def spread(m):
        h, w = m.shape
        out = torch.zeros_like(m)
        for y in range(0, h, 2):
            for x in range(0, w, 2):
                out[y:y + 2, x:x + 2] = bool(m[y:y + 2, x:x + 2].any())
        return out

    def wrap(module, forward):
        if isinstance(module, nn.Conv2d):
            def run(x, *a, **k):
                out = forward(x, *a, **k)
                if sparse[0] and out.shape[2] * out.shape[3] >= config.conv_size:
                    active = spread(under(tuple(out.shape[2:])))
                    out[edit] = torch.where(active, out[edit], out[original])
                return out
        elif isinstance(module, nn.GroupNorm):
            def run(x):
                if not sparse[0] or x.shape[2] * x.shape[3] < config.conv_size:
                    return forward(x)
                o = x[original].unflatten(1, (module.num_groups, -1))
                mean, var = o.mean((2, 3, 4), keepdim=True), o.var((2, 3, 4), correction=0, keepdim=True)
                y = (x[edit].unflatten(1, (module.num_groups, -1)) - mean) / (var + module.eps).sqrt()
                out = forward(x)
                out[edit] = y.flatten(1, 2) * module.weight[:, None, None] + module.bias[:, None, None]
                return out
        else:
            def run(x, *a, **k):
                out = forward(x, *a, **k)
                if sparse[0] and x.shape[1] >= config.token_size:
                    side = int(x.shape[1] ** 0.5)
                    active = under((side, side)).flatten()
                    mixed = config.merge * out[edit] + (1 - config.merge) * out[original]
                    out[edit] = torch.where(active[:, None], mixed, out[original])
                return out
        return run

    tokens = [part for block in describe(unet).blocks for part in (block.attn, block.cross, block.ff)]
    for module in [*tokens, *(module for module in unet.modules() if isinstance(module, (nn.Conv2d, nn.GroupNorm)))]:
        module.forward = wrap(module, module.forward)

    def begin(*_):
        step[0] += 1
        sparse[0] = not dense(step[0])
    unet.register_forward_pre_hook(begin)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("config", [Config(mask=BOX, dense=0.4, conv_size=64, token_size=64),
                                    Config(mask=BOX, dense=0.0, conv_size=1, token_size=200, merge=0.7),
                                    Config(mask=BOX, dense=0.2, conv_size=200, token_size=1, merge=1.0)])
def test_whole_runs_equal_a_program_by_hand(config):
    ours, other = UNET.pipe(), UNET.pipe()
    ours.unet.double()
    other.unet.double()
    out, report = edited(config, ours)
    assert 0 < report["saved"] < 0.5
    first = 5 - -(-config.dense * 5 // 1)
    by_hand(other, torch.tensor(BOX), config, lambda i: i >= first)
    torch.testing.assert_close(out, UNET.run(other, steps=5, **PAIR), atol=1e-4, rtol=1e-4)


def test_the_mask_is_found_behind_the_dense_steps():
    """From the latents of the plain pair, which the first steps are; a pixel outside it is never computed anew."""
    pipe, latents, ran = UNET.pipe(), [], []
    pipe.unet.register_forward_pre_hook(lambda m, args: latents.append(args[0][:2].clone()))
    plain = UNET.run(pipe, steps=10, **PAIR)
    assert plain.isfinite().all()
    total = sum(cesdi.difference(z[1], z[0]) for z in latents[1:5])
    expected = cesdi.found(total)
    pipe = UNET.pipe()
    real = cesdi.sparse_conv
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cesdi, "sparse_conv", lambda *args: (ran.append(args[3]), real(*args))[1])
        _, report = edited(Config(dense=0.4, conv_size=256, token_size=64), pipe, steps=10)
    assert report["dense"] == 4 and report["sparse"] == 6
    assert all(torch.equal(each, cesdi.blocks(expected, 2)) for each in ran) and ran
    assert report["saved"] == pytest.approx(6 * (1 - float(expected.float().mean())) / 20, abs=1e-3)


def test_several_edits_have_masks_of_their_own():
    pipe = UNET.pipe()
    with cesdi.apply(pipe, TINY) as patch:
        three = UNET.run(pipe, steps=5, batch=3, twins=True)
        assert patch.report()["sparse"] == 2 * 3
    two, _ = edited(TINY)
    torch.testing.assert_close(three[:2], two, atol=1e-3, rtol=1e-3)
    assert not torch.equal(three[1], three[2])


def test_guidance_in_two_calls_gives_the_same():
    outs = []
    for twice in (False, True):
        pipe = UNET.pipe()
        pipe.unet.double()
        with cesdi.apply(pipe, TINY):
            if twice:
                in_two_calls(pipe)
            outs.append(UNET.run(pipe, steps=6, **PAIR))
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_smaller_mask_costs_less():
    costs = []
    for side in (0, 4, 8, 16):
        mask = [[y < side and x < side for x in range(16)] for y in range(16)]
        pipe = UNET.pipe()
        with cesdi.apply(pipe, Config(mask=mask, dense=0.0, conv_size=64, token_size=64)):
            costs.append(count_macs(lambda pipe=pipe: UNET.run(pipe, steps=2, **PAIR)))
    assert costs == sorted(costs) and costs[0] < costs[1] < costs[2] < costs[3]
    plain = count_macs(lambda: UNET.run(UNET.pipe(), steps=2, **PAIR))
    assert costs[0] < 0.7 * plain and costs[3] == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("wrong, named", [
    ({"dense": 1.5}, "dense=1.5"), ({"merge": -1}, "merge=-1"), ({"block": 0}, "block=0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match="no UNet stages"):
        cesdi.apply(FAMILIES["dit"].pipe())
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        cesdi.apply(UNET.pipe().unet)
    pipe = UNET.pipe()
    with cesdi.apply(pipe):
        with pytest.raises(ValueError, match="two prompts or more"):
            UNET.run(pipe)
        with pytest.raises(ValueError, match="the same noise"):
            UNET.run(pipe, batch=2)
