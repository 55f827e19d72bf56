import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contracts import module
from drawn import digits

import methods
from accel_tools.measure.macs import count_macs
from methods import u_dit
from methods._core.dit import ddpm, hidden
from methods._core.noise import Noising

TINY = u_dit.TINY
IMAGES = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
LABELS = torch.arange(8) % (TINY.classes + 1)
TIMES = torch.arange(8) * 140


def run(model, random):
    x = IMAGES.to(model.embed.weight.dtype)
    return {"images": u_dit.generate(model, LABELS, random, steps=3), "said": model(x, TIMES, LABELS),
            "folded": u_dit.fold(model)(x, TIMES, LABELS)}


WORK = module.Work(run, {"images": (8, 2, 8, 8), "said": (8, 4, 8, 8), "folded": (8, 4, 8, 8)},
                   lambda model, stage, random: u_dit.loss(model, stage, IMAGES, LABELS, random)["loss"],
                   wrong=({"size": 12}, {"width": 12}, {"depth": (1, 1, 1)}, {"depth": (1, 1, 0, 1, 1)}, {"factor": 0},
                          {"heads": 0}, {"drop": math.inf}))


@pytest.mark.parametrize("check, case", module.cases(u_dit, WORK), ids=module.name)
def test_contract(check, case):
    check(case)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def started(**more):
    """A network none of whose layers is zero."""
    model = u_dit.build(replace(TINY, **more)).double()
    random = generator(1)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=random)
    return model


# ---- attention ---------------------------------------------------------------------------------------------------------

def test_each_phase_holds_one_pixel_of_each_cell():
    x = torch.randn(2, 3, 8, 12, generator=generator())
    found = u_dit.phases(x, 2)
    assert found.shape == (2, 4, 24, 3) and torch.equal(u_dit.cells(found, 2, 8), x)
    for i in range(2):
        for j in range(2):
            assert torch.equal(found[:, 2 * i + j].mT.unflatten(-1, (4, 6)), x[:, :, i::2, j::2])
    assert torch.equal(u_dit.cells(u_dit.phases(x, 4), 4, 8), x)


def test_phases_meet_in_the_convolution_alone():
    attn, x = started().stages[0][0].attn, torch.randn(1, 8, 8, 8, generator=generator(2)).double().requires_grad_()

    def reached():
        return (torch.autograd.grad(attn(x)[0, :, 2, 4].sum(), x)[0][0].abs().sum(0) > 1e-12)
    assert reached().all()                                       # 5x5: each pixel is near one of the phase
    attn.near.weight.data.zero_()
    mine = torch.zeros(8, 8, dtype=torch.bool)
    mine[0::2, 0::2] = True
    assert torch.equal(reached(), mine)


def test_attention_by_hand():
    """One pixel's output by loops, with angles and cosines of its own."""
    attn, x = started().stages[0][0].attn, torch.randn(1, 8, 8, 8, generator=generator(2)).double()
    attn.scale.data[:, 0, 0] = torch.tensor([3.0, 9.0])          # the second beyond what is allowed
    z = (x + attn.near(x))[0]
    q, k, v = attn.qkv(z.permute(1, 2, 0)).chunk(3, -1)          # (8, 8, 8) each: row, column, channel

    def turned(vector, row, column):                             # of 4 channels: a pair for the column, a pair for the row
        found = []
        for (a, b), angle in zip(vector.view(2, 2), (column, row), strict=True):
            found += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        found = torch.stack(found)
        return found / found.norm()
    out = []
    for head, most in ((0, math.exp(3)), (1, 100.0)):
        part, logits, values = slice(4 * head, 4 * head + 4), [], []
        mine = turned(q[3, 5, part], 1, 2)                       # pixel (3, 5) is (1, 2) of its phase
        for r in range(4):
            for c in range(4):
                logits.append(most * (mine @ turned(k[2 * r + 1, 2 * c + 1, part], r, c)))
                values.append(v[2 * r + 1, 2 * c + 1, part])
        out.append(torch.stack(logits).softmax(0) @ torch.stack(values))
    expected = attn.out.weight[..., 0, 0] @ torch.cat(out) + attn.out.bias
    torch.testing.assert_close(attn(x)[0, :, 3, 5], expected)


def test_rotation_keeps_lengths_and_sees_differences_alone():
    x, y = (torch.randn(16, 8, generator=generator(seed)).double() for seed in (0, 1))
    torch.testing.assert_close(u_dit.rotated(x, 4).norm(dim=-1), x.norm(dim=-1))
    a, b = u_dit.rotated(x[:1].expand(16, -1), 4), u_dit.rotated(y[:1].expand(16, -1), 4)
    products = (a @ b.T).view(4, 4, 4, 4)                        # row, column of one and of the other
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    assert not torch.isclose(products[0, 0, 1, 2], products[0, 0, 2, 1])


# ---- the MLP -----------------------------------------------------------------------------------------------------------

def test_folding_changes_nothing_however_often():
    model = started()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(IMAGES.double(), TIMES, LABELS)
    once = u_dit.fold(model)
    torch.testing.assert_close(once(IMAGES.double(), TIMES, LABELS), expected)
    for again in (u_dit.fold(once), u_dit.fold(model.eval()), u_dit.fold(model.train().eval())):
        assert torch.equal(again(IMAGES.double(), TIMES, LABELS), once(IMAGES.double(), TIMES, LABELS))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IMAGES.double(), TIMES, LABELS), expected)


def test_the_kernels_add_up_in_the_middle():
    mlp = u_dit.FeedForward(4, 6)
    for near, value in zip(mlp.near, (1.0, 10.0, 100.0), strict=True):
        near.weight.data.fill_(value)
    kernel = mlp.folded()[2].weight[0, 0]
    assert kernel[2, 2] == 112 and kernel[1, 3] == 11 and kernel[0, 2] == 1
    assert kernel.sum() == 25 + 90 + 100 + 1 and mlp.near[0].weight.sum() == 6 * 25


# ---- the network -------------------------------------------------------------------------------------------------------

def test_widths_of_the_stages():
    model, seen = u_dit.build(TINY), []
    for stage in model.stages:
        stage[0].register_forward_pre_hook(lambda _, args: seen.append((*args[0].shape[1:], args[1].shape[1])))
    model(IMAGES, TIMES, LABELS)
    assert seen == [(8, 8, 8, 8), (16, 4, 4, 16), (32, 2, 2, 32), (16, 4, 4, 16), (16, 8, 8, 16)]


def test_at_first_each_layer_is_the_identity_and_the_output_zero():
    model = u_dit.build(TINY)
    assert not model(IMAGES, TIMES, LABELS).any()
    x = torch.randn(2, 8, 8, 8, generator=generator())
    assert torch.equal(model.stages[0][0](x, torch.randn(2, 8, generator=generator(1))), x)


def test_skips_join_stages_of_one_size():
    model = started()
    joined, left = [], []
    for merge in model.merge:
        merge.register_forward_pre_hook(lambda _, args: joined.append(args[0]))
    for i in (0, 1):
        model.stages[i][-1].register_forward_hook(lambda _, args, out: left.append(out))
    model(IMAGES.double(), TIMES, LABELS)
    assert torch.equal(joined[0][:, 16:], left[1]) and torch.equal(joined[1][:, 8:], left[0])


def test_the_loss_by_hand():
    model, random, noising = started(), generator(5), Noising(ddpm())
    found = u_dit.loss(model, "all", IMAGES.double(), LABELS, random)
    random.manual_seed(5)
    noisy = noising.sample(IMAGES.double(), random)
    said = model(noisy.x, noisy.t, hidden(LABELS, TINY.classes, 0.1, random))
    simple = (said[:, :2] - noisy.eps).square().mean()
    torch.testing.assert_close(found["simple"], simple)
    torch.testing.assert_close(found["loss"], simple + noising.variance_bound(said[:, :2], said[:, 2:], noisy).mean())


# ---- what it costs -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, heads, use, training", [(96, 4, 6.02, 7.13), (192, 8, 22.18, 26.51), (384, 16, 84.91, 102.03)])
def test_computing_of_the_published_sizes(width, heads, use, training):
    config = u_dit.Config(width=width, heads=heads)
    assert u_dit.macs(config) / 1e9 == pytest.approx(use, abs=0.006)
    assert u_dit.macs(config, folded=False) / 1e9 == pytest.approx(training, abs=0.006)


@pytest.mark.parametrize("config", [TINY, u_dit.TRAINED["u_dit"], replace(TINY, factor=1, depth=(1, 2, 1, 1, 2))])
def test_computing_is_what_the_closed_form_says(config):
    model, x = u_dit.build(config), torch.zeros(1, config.channels, config.size, config.size)
    for network, is_folded in ((model, False), (u_dit.fold(model), True)):
        found = count_macs(lambda network=network: network(x, torch.zeros(1), torch.zeros(1, dtype=torch.long)))
        assert found == u_dit.macs(config, folded=is_folded)


def test_attention_within_phases_costs_a_quarter():
    x = torch.zeros(1, 8, 8, 8)
    products = []
    for factor in (1, 2):
        attn = u_dit.Attention(8, 2, factor)
        products.append(count_macs(lambda attn=attn: attn(x)) - 64 * (25 * 8 + 4 * 64))
    assert products == [2 * 64 ** 2 * 8, 2 * 64 ** 2 * 8 // 4]


# ---- sampling ----------------------------------------------------------------------------------------------------------

def test_one_step_gives_what_is_seen_in_the_noise():
    model = started()
    x = torch.randn(8, 2, 8, 8, generator=generator(3)).double()
    kept = float((1 - ddpm().betas.double()).prod())
    noise = model(x, torch.full((8,), 999), LABELS)[:, :2]
    found = u_dit.generate(model, LABELS, generator(3), steps=1, guidance=1.0)
    torch.testing.assert_close(found, (x - (1 - kept) ** 0.5 * noise) / kept ** 0.5)


def test_samples_follow_guidance():
    model = started()
    plain, strong = (u_dit.generate(model, LABELS, generator(), steps=4, guidance=weight) for weight in (1.0, 4.0))
    none = LABELS == TINY.classes
    assert torch.allclose(plain[none], strong[none]) and not torch.allclose(plain[~none], strong[~none])


def test_what_is_seen_is_bounded_where_asked():
    assert u_dit.generate(started(clip=0.5), LABELS, generator(), steps=1).abs().max() == 0.5
    assert u_dit.generate(started(), LABELS, generator(), steps=1).abs().max() > 0.5


def test_bad_inputs_are_named():
    model = u_dit.build(TINY)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4"):
        u_dit.loss(model, "all", IMAGES[:1], torch.tensor([5]), generator())
    with pytest.raises(ValueError, match="stage='one' must be one of all"):
        u_dit.loss(model, "one", IMAGES, LABELS, generator())
    with pytest.raises(ValueError, match="steps=0"):
        u_dit.generate(model, LABELS, generator(), steps=0)


# ---- the bundled weights -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_bundled_weights_know_digits_from_noise():
    """The error of an untrained network falls to less than 0.2 of it, on digits of another model."""
    images, labels = digits()
    model = u_dit.build(u_dit.TRAINED["u_dit"])
    before = u_dit.loss(model, "all", F.pixel_unshuffle(images, 2), labels, generator(9))["simple"]
    u_dit.load(model, methods.weights("u_dit"))
    assert u_dit.loss(model, "all", F.pixel_unshuffle(images, 2), labels, generator(9))["simple"] < 0.2 * before
