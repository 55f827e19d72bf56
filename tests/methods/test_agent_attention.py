import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from accel_kernels.agent_attention import agent_attention as kernel
from accel_tools.measure.macs import count_macs
from methods import agent_attention, tome
from methods._core.tokens import destinations, reduction
from methods.agent_attention import AgentAttention


@pytest.mark.parametrize("check, case", contract.cases(agent_attention, agent_attention.Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


def by_the_map(q, k, v, a, scale, sharp, shortcut):
    """The N x N map in full, a loop over samples and heads."""
    out = torch.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            broadcast = (sharp * q[b, h] @ a[b, h].T).softmax(-1)
            aggregate = (scale * a[b, h] @ k[b, h].T).softmax(-1)
            whole = broadcast @ aggregate
            torch.testing.assert_close(whole.sum(-1), torch.ones(len(whole), dtype=whole.dtype))
            assert torch.linalg.matrix_rank(whole) <= a.shape[2]
            out[b, h] = whole @ v[b, h] + shortcut * v[b, h]
    return out


@pytest.mark.parametrize("stride, share, rows", [(4, 0.95, 256), (2, 0.5, 2048)])
def test_merged_lengths_of_the_official_recipe(stride, share, rows):
    """At 64 x 64, ratio 0.4: 2458 tokens; 256 agents pass 2n < N', 2048 do not."""
    dst = destinations(1, 64, 64, stride, None)
    kept, agents = (4096 - reduction(4096, len(dst), ratio) for ratio in (0.4, share))
    assert (kept, agents) == (2458, rows)
    assert (2 * agents < kept) == (stride == 4)


def test_a_step_of_the_whole_block_worked_in_a_loop():
    """One self-attention of a UNet: merge, attend through agents, copy back; tokens and agents from one sorted matching."""
    pipe = FAMILIES["unet"].pipe()
    attn = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    norm = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].norm1
    seen = {}
    norm.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    with agent_attention.apply(pipe, agent_attention.Config(random=False, stride=2, agent_ratio=0.74, ratio=0.3)):
        attn.register_forward_hook(lambda _, args, out: seen.setdefault("out", out))
        pipe.unet(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 5, 16))
    x, n, dst = seen["x"], 64, [i for i in range(64) if i // 8 % 2 == 0 and i % 2 == 0]
    src = [i for i in range(n) if i not in dst]
    unit = torch.nn.functional.normalize(x[0], dim=-1)
    best = {i: max((float(unit[i] @ unit[j]), j) for j in dst) for i in src}
    order = sorted(src, key=lambda i: -best[i][0])
    y = norm(x)[0]

    def merged(r):
        into = {i: best[i][1] for i in order[:r]}
        rows = [i for i in src if i not in into] + dst
        return rows, into, torch.stack([torch.stack([y[i], *(y[j] for j, d in into.items() if d == i)]).mean(0) for i in rows])

    rows, into, z = merged(int(n * 0.3))
    _, _, a = merged(int(n * 0.74))
    assert len(z) == 45 and len(a) == 17

    def split(t):
        return t.view(len(t), attn.heads, -1).transpose(0, 1)[None]

    q, k, v, a = split(attn.to_q(z)), split(attn.to_k(z)), split(attn.to_v(z)), split(attn.to_q(a))
    d = q.shape[-1]
    mixed = by_the_map(q, k, v, a, d ** -0.5, d ** -0.15, 0.075)[0].transpose(0, 1).flatten(1)
    short = attn.to_out[0](mixed)
    expected = torch.stack([short[rows.index(into.get(i, i))] for i in range(n)])
    torch.testing.assert_close(seen["out"][0], expected, atol=1e-5, rtol=1e-4)


def test_after_the_share_of_agents_only_merging_is_left():
    family = FAMILIES["unet"]
    pipe = family.pipe()
    with agent_attention.apply(pipe, agent_attention.Config(agent_share=0.4)) as patch:
        family.run(pipe, steps=5)
        report = patch.report()
    assert (report["agents"], report["merged"]) == (2 * 5, 3 * 5)                       # five blocks at the full resolution


def test_too_many_agents_are_plain_token_merging():
    family = FAMILIES["dit"]
    config = agent_attention.Config(agent_ratio=0.5, stride=2, ratio=0.4)                # 32 agents for 39 tokens
    ours, theirs = family.pipe(), family.pipe()
    with agent_attention.apply(ours, config), tome.apply(theirs, tome.Config(ratio=0.4)):
        assert torch.equal(family.run(ours), family.run(theirs))


def test_without_agents_it_is_plain_token_merging():
    family = FAMILIES["unet"]
    ours, theirs = family.pipe(), family.pipe()
    with agent_attention.apply(ours, agent_attention.Config(agent_share=0.0)), tome.apply(theirs, tome.Config(ratio=0.4)):
        assert torch.equal(family.run(ours), family.run(theirs))


def test_as_many_agents_as_queries_are_two_whole_maps():
    """It is not softmax attention: the map of the queries over themselves stands before it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 10, 8, dtype=torch.float64).unbind(0)
    scale = 8 ** -0.5
    out = kernel(q, k, v, q, scale=scale, sharp=scale)
    attention = (scale * q @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(out, (scale * q @ q.mT).softmax(-1) @ attention)
    assert (out - attention).abs().max() > 0.1


def test_cost_breaks_even_at_half_as_many_agents_as_tokens():
    """Four products of N' x n x d, against two of N' x N' x d."""
    q, k, v = torch.randn(3, 1, 2, 24, 8).unbind(0)
    whole = count_macs(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert whole == 2 * 2 * 24 * 24 * 8
    for n in (4, 12, 20):
        a = torch.randn(1, 2, n, 8)
        found = count_macs(lambda a=a: kernel(q, k, v, a, scale=1.0, sharp=1.0))
        assert found == 4 * 2 * 24 * n * 8 and (found < whole) == (n < 12)


def test_a_mask_and_a_bare_model_are_refused():
    pipe = FAMILIES["unet"].pipe()
    x, text, mask = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 16), torch.ones(1, 256)
    with agent_attention.apply(pipe), pytest.raises(ValueError, match="this one has a mask"):
        pipe.unet(x, 10, text, attention_mask=mask)
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        agent_attention.apply(pipe.unet)


@pytest.mark.parametrize("class_token", [False, True])
def test_parameters_of_the_trained_module(class_token):
    """DeiT-T: projections, a depthwise 3 x 3, and for each of 3 heads and 49 agents two block maps, rows and columns."""
    module = AgentAttention(192, 3, (14, 14), class_token=class_token)
    projections, depthwise = 192 * 3 * 192 + 3 * 192 + 192 * 192 + 192, 9 * 192 + 192
    biases = 3 * 49 * 2 * (49 + 14 + 14 + class_token)
    assert sum(parameter.numel() for parameter in module.parameters()) == projections + depthwise + biases


@pytest.mark.parametrize("class_token", [False, True])
def test_trained_module_in_a_loop(class_token):
    torch.manual_seed(0)
    module = AgentAttention(12, 2, (4, 6), agents=4, class_token=class_token).double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    extra = int(class_token)
    x = torch.randn(2, 24 + extra, 12, dtype=torch.float64)
    q, k, v = module.qkv(x).split(12, dim=-1)
    first, second = module.biases()
    assert first.shape == (1, 2, 4, 24 + extra) and second.shape == (1, 2, 24 + extra, 4)
    out = torch.zeros_like(x)
    for b in range(2):
        for h in range(2):
            part = slice(6 * h, 6 * h + 6)
            plane = q[b, extra:, part].view(4, 6, 6)
            a = torch.stack([plane[2 * i:2 * i + 2, 3 * j:3 * j + 3].mean((0, 1)) for i in range(2) for j in range(2)])
            gathered = (a @ k[b, :, part].T * 6 ** -0.5 + first[0, h]).softmax(-1) @ v[b, :, part]
            out[b, :, part] = (q[b, :, part] @ a.T * 6 ** -0.5 + second[0, h]).softmax(-1) @ gathered
        values = v[b, extra:].view(4, 6, 12)
        for i in range(4):
            for j in range(6):
                near = module.dwc.bias.clone()
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < 4 and 0 <= j + dj < 6:
                            near = near + module.dwc.weight[:, 0, di + 1, dj + 1] * values[i + di, j + dj]
                out[b, extra + 6 * i + j] += near
    torch.testing.assert_close(module(x), module.proj(out))
    module(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_bias_of_an_agent_over_a_place():
    """The block bias is resampled to the grid; row and column biases belong to rows and columns."""
    module = AgentAttention(8, 1, (3, 5), agents=4)
    for parameter in (module.an_bias, module.na_bias, module.ah_bias, module.aw_bias, module.ha_bias, module.wa_bias):
        torch.nn.init.zeros_(parameter)
    module.ah_bias.data[0, 0, 2, 1] = 1.0
    module.wa_bias.data[0, 0, 0, 3, 1] = 1.0
    first, second = (bias[0, 0].detach() for bias in module.biases())
    expected = torch.zeros(4, 3, 5)
    expected[2, 1] = 1
    assert torch.equal(first, expected.flatten(1))
    expected = torch.zeros(3, 5, 4)
    expected[:, 3, 1] = 1
    assert torch.equal(second, expected.flatten(0, 1))


@pytest.mark.parametrize("wrong, named", [({"ratio": 1.2}, "ratio=1.2"), ({"agent_ratio": -0.1}, "agent_ratio=-0.1"),
                                          ({"stride": 0}, "stride=0"), ({"agent_share": 1.1}, "agent_share=1.1")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        agent_attention.Config(**wrong)
    with pytest.raises(ValueError, match="agents=5 must be a square"):
        AgentAttention(8, 1, (3, 5), agents=5)
    with pytest.raises(ValueError, match="num_heads=3 does not divide dim=8"):
        AgentAttention(8, 3, (3, 5))
