import contract
import pytest
import torch
from families import FAMILIES

from methods import ocd
from methods._core.solver import ddim_step, flow_step
from methods._core.tokens import merge_plan
from methods.tome import destinations


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


@pytest.mark.parametrize("name", ["dit", "cogvideox", "flux", "unet"])
def test_the_crop_is_computed_each_step_and_the_frame_each_phi_steps(name):
    """Inside the box the output is that of the model on the crop, outside that of the last whole frame."""
    family = FAMILIES[name]
    pipe, twin = family.pipe(), family.pipe()
    calls = []
    model = pipe.unet if name == "unet" else pipe.transformer
    plain = twin.unet if name == "unet" else twin.transformer

    def note(_, args, kwargs, out):
        names = ["sample" if name == "unet" else "hidden_states", "timestep", "encoder_hidden_states"]
        inputs = dict(zip(names, args, strict=False)) | kwargs
        calls.append((inputs, out[0] if isinstance(out, tuple) else out.sample))

    with ocd.apply(pipe, ocd.Config(phi=2, gamma=0.5, ratio=0.0)) as patch:
        model.register_forward_hook(note, with_kwargs=True)
        family.run(pipe, steps=6)
        assert (patch.report()["crops"], patch.report()["frames"]) == (3, 2 + 3)
    latent = "sample" if name == "unet" else "hidden_states"
    whole = None
    for i, (inputs, out) in enumerate(calls[:4]):
        inputs = {**inputs, "return_dict": False}
        x = inputs[latent]
        if i % 2 == 0 or i >= 3:
            whole = plain(**inputs)[0]
        if i >= 3:
            assert torch.equal(out, whole)
            continue
        if name == "flux":
            rows = torch.arange(64).view(8, 8)[2:6, 2:6].flatten()
            part = plain(**inputs | {latent: x[:, rows], "img_ids": inputs["img_ids"][rows]})[0]
            expected = whole.clone()
            expected[:, rows] = part
        else:
            height, width = x.shape[-2:]
            y, z = (slice(n // 4 // 2 * 2, -(-3 * n // 4 // 2) * 2) for n in (height, width))
            more = {}
            if name == "cogvideox":
                rows = torch.arange(72).view(3, 4, 6)[:, y.start // 2:y.stop // 2, z.start // 2:z.stop // 2].flatten()
                more = {"image_rotary_emb": tuple(part[rows] for part in inputs["image_rotary_emb"])}
            part = plain(**inputs | {latent: x[..., y, z]} | more)[0]
            inside = ocd.foreground(ocd.Config(), 1, height, width)[0, y, z]
            expected = whole.clone()
            expected[..., y, z] = torch.where(inside, part, expected[..., y, z])
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


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
    """N = 20, gamma = 1/4, phi = 5: fifteen crops and three frames, then five frames."""
    pipe = FAMILIES["dit"].pipe()
    with ocd.apply(pipe, ocd.Config(phi=5)) as patch:
        FAMILIES["dit"].run(pipe, steps=20)
        assert (patch.report()["crops"], patch.report()["frames"]) == (15, 3 + 5)


def test_what_would_meet_two_sizes_is_refused():
    from methods import deepcache, fora
    for name, method in (("unet", deepcache), ("dit", fora)):
        pipe = FAMILIES[name].pipe()
        with method.apply(pipe), pytest.raises(ValueError, match="cannot stack"):
            ocd.apply(pipe)


@pytest.mark.parametrize("wrong, named", [({"box": (0.5, 0, 0.5, 1)}, "box="), ({"phi": 0}, "phi=0"),
                                          ({"eta": 1.5}, "eta=1.5"), ({"mask": torch.zeros(3, 3)}, "mask has shape")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        ocd.Config(**wrong)
