import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from methods import deepcache, fora, ocd
from methods._core.solver import ddim_step, flow_step
from methods._core.tokens import destinations, merge_plan


@pytest.mark.parametrize("check, case", contract.cases(ocd, ocd.Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


def moved(cosine, fore, eta, r):
    """Which sources are merged away, all into one destination behind them."""
    n = len(cosine)
    score = ocd.weighted(torch.tensor([cosine]), torch.tensor(fore), eta)
    plan = merge_plan(score, torch.zeros(1, n, dtype=torch.long), torch.arange(n), torch.tensor([n]), r)
    return sorted(set(range(n)) - set(plan.owner[0].tolist()))


def test_worked_by_hand():
    """a is foreground and most alike, b and c are background."""
    cosine, fore = [0.9, 0.6, 0.5], [True, False, False]
    assert moved(cosine, fore, 1.0, 1) == [0]
    assert moved(cosine, fore, 0.5, 1) == [1]
    assert moved(cosine, fore, 0.5, 2) == [1, 2]


def test_a_negative_similarity_gains_nothing_from_the_weight():
    assert moved([-0.9, -0.1], [True, False], 0.5, 1) == [1]
    assert ocd.weighted(torch.tensor([[-1.0, 1.0]]), torch.tensor([True, True]), 0.3).tolist() == [[0.0, pytest.approx(0.3)]]


def test_the_smaller_eta_the_fewer_foreground_tokens_merge():
    torch.manual_seed(0)
    cosine, fore = (2 * torch.rand(60) - 1).tolist(), (torch.rand(60) < 0.5).tolist()
    counts = [sum(fore[i] for i in moved(cosine, fore, eta, 30)) for eta in (1.0, 0.8, 0.5, 0.2, 0.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    background = 60 - sum(fore)
    assert sum(fore[i] for i in moved(cosine, fore, 0.0, min(30, background))) == 0


def test_foreground_of_a_box_and_of_a_mask():
    box = ocd.Config(box=(0.25, 0.5, 0.75, 1.0))
    expected = torch.zeros(2, 4, 8, dtype=torch.bool)
    expected[:, 1:3, 4:] = True
    assert torch.equal(ocd.foreground(box, 2, 4, 8), expected)
    mask = torch.zeros(2, 8, 8)
    mask[1, 5, 2] = 1
    found = ocd.foreground(ocd.Config(mask=mask), 2, 4, 4)
    assert found.nonzero().tolist() == [[1, 2, 1]]
    assert ocd.foreground(ocd.Config(mask=mask), 1, 4, 4)[0, 2, 1]           # one grid for all frames: where it ever is


def test_a_held_noise_is_one_long_step():
    torch.manual_seed(0)
    x, eps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    a = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    for step in (ddim_step, flow_step):
        y = x
        for here, there in zip(a, a[1:], strict=False):
            y = step(y, eps, here, there)
        torch.testing.assert_close(y, step(x, eps, a[0], a[-1]))


ASIDE = (0.25, 0.5, 0.75, 1.0)                                              # a box at the right edge


def calls_of(name, model):
    """A list that fills with the inputs by name and the output of every call of the model."""
    calls, names = [], ["sample" if name == "unet" else "hidden_states", "timestep", "encoder_hidden_states"]

    def note(_, args, kwargs, out):
        inputs = dict(zip(names, args, strict=False)) | kwargs | {"return_dict": False}
        calls.append((inputs, out[0] if isinstance(out, tuple) else out.sample))
    model.register_forward_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "latte", "cogvideox", "flux", "unet"])
def test_the_crop_is_computed_each_step_and_the_frame_each_phi_steps(name):
    """Inside the box the output is that of the model on the crop at its place, outside that of the last whole frame."""
    family = FAMILIES[name]
    pipe, twin = family.pipe(), family.pipe()
    model, plain, cropped = (pipe.unet if name == "unet" else pipe.transformer for pipe in (pipe, twin, family.pipe()))
    with ocd.apply(pipe, ocd.Config(phi=2, gamma=0.5, ratio=0.0, box=ASIDE)) as patch:
        calls = calls_of(name, model)
        family.run(pipe, steps=6)
        assert (patch.report()["crops"], patch.report()["frames"]) == (3, 2 + 3)
    latent = "sample" if name == "unet" else "hidden_states"
    if name in ("dit", "pixart", "sd3", "latte"):
        embed, rows = cropped.pos_embed, torch.arange(64).view(8, 8)[2:6, 4:].flatten()
        places = (plain.pos_embed(torch.zeros(1, 4, 16, 16)) - embed.proj.bias)[:, rows]
        embed.forward = lambda x: embed.proj(x).flatten(2).mT + places
    whole = None
    for i, (inputs, out) in enumerate(calls[:4]):
        x = inputs[latent]
        if i % 2 == 0 or i >= 3:
            whole = plain(**inputs)[0]
        if i >= 3:
            assert torch.equal(out, whole)
            continue
        if name == "flux":
            rows = torch.arange(64).view(8, 8)[2:6, 4:].flatten()
            part = cropped(**inputs | {latent: x[:, rows], "img_ids": inputs["img_ids"][rows]})[0]
            expected = whole.clone()
            expected[:, rows] = part
        else:
            height, width = x.shape[-2:]
            y, z = slice(height // 4, height * 3 // 4), slice(width // 2, width)
            more = {}
            if name == "cogvideox":
                rows = torch.arange(72).view(3, 4, 6)[:, 1:3, 3:].flatten()
                more = {"image_rotary_emb": tuple(part[rows] for part in inputs["image_rotary_emb"])}
            expected = whole.clone()
            expected[..., y, z] = cropped(**inputs | {latent: x[..., y, z]} | more)[0]
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_residuals_are_cropped_with_the_latent():
    """Those of a ControlNet, and those of an adapter, a list that a UNet empties as it goes."""
    family = FAMILIES["unet"]
    pipe, plain = family.pipe(), family.pipe().unet
    sizes = [(32, 16)] * 3 + [(32, 8)] * 3 + [(32, 4)] + [(64, 4)] * 2
    down = [torch.randn(2, channels, side, side) for channels, side in sizes]
    given = {"down_block_additional_residuals": down, "mid_block_additional_residual": torch.randn(2, 64, 4, 4)}
    adapter = [torch.randn(2, 32, 16, 16), torch.randn(2, 32, 8, 8), torch.randn(2, 64, 4, 4)]
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | given | {
        "down_intrablock_additional_residuals": list(adapter)}), with_kwargs=True)
    with ocd.apply(pipe, ocd.Config(phi=2, ratio=0.0, box=ASIDE)):
        calls = calls_of("unet", pipe.unet)
        family.run(pipe, steps=3)

    def cut(x):
        n = x.shape[-1]
        return x[..., n // 4:3 * n // 4, n // 2:]
    inputs, out = calls[0]
    short = {name: cut(value) if torch.is_tensor(value) else [cut(each) for each in value] for name, value in given.items()}
    part = plain(**inputs | short | {"sample": cut(inputs["sample"]),
                                     "down_intrablock_additional_residuals": [cut(each) for each in adapter]})[0]
    torch.testing.assert_close(cut(out), part, atol=1e-4, rtol=1e-4)


def test_a_mask_joins_the_crop_where_the_object_is():
    """An L in the crop of its bounding box: two parts are the crop's, the third is the frame's, and counts as background."""
    family, fores, weighted = FAMILIES["dit"], [], ocd.weighted
    mask = torch.zeros(1, 16, 16)
    mask[0, 4:12, 4:8] = mask[0, 8:12, 4:12] = 1
    pipe, plain = family.pipe(), family.pipe().transformer
    with pytest.MonkeyPatch.context() as patcher, ocd.apply(pipe, ocd.Config(phi=2, mask=mask)):
        patcher.setattr(ocd, "weighted", lambda cosine, fore, eta: fores.append(fore) or weighted(cosine, fore, eta))
        family.run(pipe, steps=3)
    crop = [fore for fore in fores if len(fore) == 12]                                       # 4 x 4 tokens, 4 destinations
    assert crop and all(int(fore.sum()) == 9 for fore in crop)
    with ocd.apply(pipe, ocd.Config(phi=2, ratio=0.0, mask=mask)):
        calls = calls_of("dit", pipe.transformer)
        family.run(pipe, steps=3)
    inputs, out = calls[0]
    whole = plain(**inputs)[0]
    same = (out == whole).all(1).all(0)
    assert torch.equal(same, mask[0] == 0)
    box = torch.zeros(1, 16, 16)
    box[0, 4:12, 4:12] = 1
    twin = family.pipe()
    with ocd.apply(pipe, ocd.Config(mask=box)), ocd.apply(twin, ocd.Config()):
        assert torch.equal(family.run(pipe), family.run(twin))


@pytest.mark.parametrize("setting", [dict(gamma=1.0), dict(box=(0, 0, 1, 1))])
def test_no_high_noise_phase_or_an_object_that_fills_the_frame_is_ordinary_sampling(setting):
    family = FAMILIES["latte"]
    pipe = family.pipe()
    with ocd.apply(pipe, ocd.Config(ratio=0.0, **setting)):
        assert torch.equal(family.run(pipe), family.run(family.pipe()))


def test_one_attention_in_a_loop():
    """Keys and values of background sources are averaged into their destination; every query keeps its output."""
    pipe, seen = FAMILIES["dit"].pipe(), {}
    config = ocd.Config(phi=1, ratio=0.4, eta=0.3)
    attn = pipe.transformer.transformer_blocks[0].attn1
    with ocd.apply(pipe, config):
        attn.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
        FAMILIES["dit"].run(pipe, steps=1)
    x, n = seen["x"], 64
    dst = destinations(1, 8, 8, 2, torch.Generator().manual_seed(0)).tolist()
    fore = ocd.foreground(config, 1, 8, 8).flatten().tolist()
    src = [i for i in range(n) if i not in dst]
    q, k, v = (getattr(attn, name)(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k", "to_v"))
    out = torch.empty_like(q)
    for b in range(len(x)):
        unit = torch.nn.functional.normalize(x[b], dim=-1)
        near = {i: max((float(unit[i] @ unit[j]), -j) for j in dst) for i in src}
        score = {i: (1 + near[i][0]) / 2 * (0.3 if fore[i] else 1) for i in src}
        into = {i: -near[i][1] for i in sorted(src, key=lambda i: -score[i])[: int(n * 0.4)]}
        rows = [[i] for i in src if i not in into] + [[j, *(i for i in into if into[i] == j)] for j in dst]
        for h in range(attn.heads):
            keys, values = (torch.stack([t[b, h, row].mean(0) for row in rows]) for t in (k, v))
            out[b, h] = (q[b, h] @ keys.T * q.shape[-1] ** -0.5).softmax(-1) @ values
    expected = attn.to_out[0](out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=1e-4)


def test_cost_of_the_phases():
    """N = 20, gamma = 1/4, phi = 5, a quarter of the frame: fifteen crops and three frames, then five frames."""
    pipe, tokens = FAMILIES["dit"].pipe(), []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    with ocd.apply(pipe, ocd.Config(phi=5)) as patch:
        FAMILIES["dit"].run(pipe, steps=20)
        report = patch.report()
    assert (report["crops"], report["frames"]) == (15, 3 + 5)
    assert sum(tokens) == (15 * 0.25 + 3 + 5) * 64
    assert report["merged"] == 3 * len(tokens)                                          # three blocks merge in each of them


def test_a_phase_ends_at_its_step():
    """(1 - 0.8) * 20 is just below 4 in floating point."""
    pipe = FAMILIES["dit"].pipe()
    with ocd.apply(pipe, ocd.Config(phi=5, gamma=0.8)) as patch:
        FAMILIES["dit"].run(pipe, steps=20)
        assert patch.report()["crops"] == 4


def test_at_full_weight_the_object_is_merged_like_the_rest():
    """eta = 1 picks what plain merging picks; nothing to merge changes nothing."""
    torch.manual_seed(0)
    src, dst, cosine = torch.arange(40), torch.arange(40, 50), 2 * torch.rand(2, 40) - 1
    into, fore = torch.randint(10, (2, 40)), torch.rand(40) < 0.5
    ours = merge_plan(ocd.weighted(cosine, fore, 1.0), into, src, dst, 20)
    assert torch.equal(ours.owner, merge_plan(cosine, into, src, dst, 20).owner)
    family = FAMILIES["latte"]
    results = []
    for config in (ocd.Config(phi=1, eta=1.0), ocd.Config(phi=1, eta=1.0, box=(0, 0, 0.25, 0.25)), ocd.Config(phi=1)):
        pipe = family.pipe()
        with ocd.apply(pipe, config):
            results.append(family.run(pipe))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name, method", [("unet", deepcache), ("dit", fora)])
def test_a_cache_keeps_the_crop_apart_from_the_frame(name, method):
    """At an interval of 1 < phi it computes every crop anew, which changes nothing; else it reuses crops for crops."""
    family, outs = FAMILIES[name], []
    for interval in (1, 2):
        pipe = family.pipe()
        with ocd.apply(pipe), method.apply(pipe, method.Config(interval=interval)) as cache:
            outs.append(family.run(pipe, steps=6))
            assert cache.report()["state"] == ("off" if interval == 1 else "engaged")
    assert outs[1].isfinite().all() and not torch.equal(*outs)


@pytest.mark.parametrize("wrong, named", [({"box": (0.5, 0, 0.5, 1)}, "box="), ({"phi": 0}, "phi=0"),
                                          ({"eta": 1.5}, "eta=1.5"), ({"mask": torch.zeros(3, 3)}, "mask has shape")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        ocd.Config(**wrong)


def test_configurations_with_masks_can_be_compared():
    config = ocd.Config(mask=torch.ones(1, 4, 4))
    assert config == config and config != ocd.Config(mask=torch.ones(1, 4, 4)) and hash(config)


def test_a_crop_too_small_for_a_cell_is_not_merged():
    family = FAMILIES["unet"]
    pipe = family.pipe()
    with ocd.apply(pipe, ocd.Config(box=(0.5, 0.5, 0.55, 0.55), stride=4)) as patch:
        assert family.run(pipe).isfinite().all()
        assert patch.report()["crops"] and patch.report()["merged"]
