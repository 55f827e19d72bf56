import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from accel_tools.measure.macs import count_macs
from methods import cat_pruning


@pytest.mark.parametrize("check, case", contract.cases(cat_pruning, cat_pruning.Config(warmup=2)), ids=contract.name)
def test_contract(check, case):
    check(case)


def attention(q, k, v, heads):
    q, k, v = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)


def by_hand(model, x, text, pooled, t, memory, rows):
    """One sample through SD3, all tensors (tokens, C); rows None renews everything. -> patches of noise as computed."""
    def write(key, fresh):
        if rows is not None:
            old = memory[key].clone()
            old[rows] = fresh
            fresh = old
        memory[key] = fresh
        return fresh

    pick = slice(None) if rows is None else rows
    image = model.pos_embed(x[None])[0]
    temb = model.time_text_embed(t[None], pooled[None])
    words = model.context_embedder(text)
    for n, block in enumerate(model.transformer_blocks):
        attn = block.attn
        y, gate, shift, scale, gate_ff = block.norm1(image[None], emb=temb)
        if block.context_pre_only:
            w = block.norm1_context(words[None], temb)[0]
        else:
            w, w_gate, w_shift, w_scale, w_gate_ff = block.norm1_context(words[None], emb=temb)
            w = w[0]
        y = y[0]
        k, v = write((n, "k"), attn.to_k(y[pick])), write((n, "v"), attn.to_v(y[pick]))
        q = attn.to_q(y[pick])
        out = attention(torch.cat([q, attn.add_q_proj(w)]), torch.cat([k, attn.add_k_proj(w)]),
                        torch.cat([v, attn.add_v_proj(w)]), attn.heads)
        image = image + gate * write((n, "attn"), attn.to_out[0](out[:len(q)]))
        y = block.norm2(image) * (1 + scale) + shift
        image = image + gate_ff * write((n, "ff"), block.ff(y[pick]))
        if not block.context_pre_only:
            words = words + w_gate * attn.to_add_out(out[len(q):])
            words = words + w_gate_ff * block.ff_context(block.norm2_context(words) * (1 + w_scale) + w_shift)
    return model.proj_out(model.norm_out(image[None], temb)[0])


def test_a_pruned_step_worked_by_hand(monkeypatch):
    """Stale keys and values, stale outputs and stale noise outside the selection, everything else fresh."""
    model, twin = (FAMILIES["sd3"].pipe().transformer.double() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    text, pooled = (torch.randn(shape, generator=generator).double() for shape in ((2, 5, 16), (2, 16)))
    xs = torch.randn(5, 1, 4, 8, 12, generator=generator).double()
    rows = [torch.randperm(24, generator=generator)[:8].sort().values for _ in range(2)]
    monkeypatch.setattr(cat_pruning, "first_selection", lambda *_: rows[0])
    monkeypatch.setattr(cat_pruning, "next_selection", lambda *_: rows[1])
    memory, noise = [{}, {}], [None, None]
    with cat_pruning.apply(model, cat_pruning.Config(warmup=3, keep=1 / 3)) as patch:
        for i, x in enumerate(xs):
            t = torch.tensor(900.0 - 100 * i).double()
            out = model(x.repeat(2, 1, 1, 1), text, pooled, t.expand(2), return_dict=False)[0]
            chosen = None if i < 3 else rows[i - 3]
            for b in range(2):
                fresh = by_hand(twin, x[0], text[b], pooled[b], t, memory[b], chosen)
                if chosen is not None:
                    fresh = torch.where(torch.isin(torch.arange(24), chosen)[:, None], fresh, noise[b])
                noise[b] = fresh
                picture = fresh.view(4, 6, 2, 2, 4).permute(4, 0, 2, 1, 3).reshape(4, 8, 12)
                torch.testing.assert_close(out[b], picture)
        assert (patch.report()["full"], patch.report()["pruned"]) == (3, 2)


def test_the_selection_reads_the_conditional_branch_and_serves_both(monkeypatch):
    seen = []
    real = cat_pruning.first_selection
    monkeypatch.setattr(cat_pruning, "first_selection", lambda delta, *rest: seen.append(delta) or real(delta, *rest))
    pipe, outs = FAMILIES["sd3"].pipe(), []
    pipe.transformer.proj_out.register_forward_hook(lambda _, args, out: outs.append(out))
    with cat_pruning.apply(pipe, cat_pruning.Config(warmup=2)):
        FAMILIES["sd3"].run(pipe, steps=3, batch=2)
    assert len(seen) == 2                                                       # two prompts, each for itself
    for prompt in range(2):
        torch.testing.assert_close(seen[prompt], (outs[1] - outs[0])[2 + prompt])


def test_first_selection_worked_by_hand():
    """Two clusters of ten: each gives k / 10 tokens, those of the largest change fill up."""
    labels = torch.tensor([0] * 10 + [1] * 10)
    delta = torch.zeros(20, 2)
    delta[:, 0] = torch.arange(20) / 10
    chosen = cat_pruning.first_selection(delta, labels, 2, 10, 10, 2)
    assert chosen.tolist() == [9, *range(11, 20)]                               # one of each cluster, then the largest left
    assert cat_pruning.pool(delta, labels, 3)[:, 0].tolist() == [delta[9, 0], delta[19, 0], 0]


def test_smoothing_worked_by_hand():
    labels = torch.tensor([0, 0, 1, 2])                                         # 0 touches 1, 1 touches 2
    pooled = torch.tensor([[3.0, 0.0], [0.0, 6.0], [9.0, 0.0]])
    expected = [[2 * 1.5 + 3, 2 * 3 + 6.0], [2 * 4 + 9.0, 2 * 2 + 6.0], [2 * 4.5 + 9, 2 * 3 + 6.0]]
    assert cat_pruning.smooth(pooled, labels, 1, 4).tolist() == expected
    assert cat_pruning.smooth(pooled, labels, 1, 4, fused_sum=True)[0].tolist() == [3 + 1.5 + 3, 6 + 3 + 6.0]


def test_next_selection_takes_the_longest_waiting_and_the_most_changed():
    torch.manual_seed(0)
    tokens, k = 400, 120
    labels, delta, frequency = torch.randint(20, (tokens,)), torch.randn(tokens, 4), torch.rand(tokens)
    chosen = cat_pruning.next_selection(delta, labels, frequency, k, 20, 0.25)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == k
    assert set(frequency.argsort()[:90].tolist()) <= set(chosen.tolist())
    score = torch.stack([delta[labels == c].amax(0).norm() for c in range(20)])
    best = int(score.argmax())
    places = (labels == best).nonzero()[:, 0]
    top = places[delta[places].norm(dim=1).argsort(descending=True)[: min(18, len(places))]]     # 3 * int(120 // 5 / 4)
    assert set(top.tolist()) <= set(chosen.tolist())


def test_the_released_numbers_of_a_grid_of_64_x_64(monkeypatch):
    """30 % of 4096 tokens: 122 from each cluster; later 183, 122 and 61 by change of noise, 307 in all, and 921 by waiting."""
    asked, real, k = [], cat_pruning._ranked, int(0.3 * 4096)
    monkeypatch.setattr(cat_pruning, "_ranked", lambda values, places, k: asked.append(k) or real(values, places, k))
    even = torch.arange(20).repeat_interleave(205)[:4096]
    place = torch.arange(4096.0)[:, None]                                     # cluster 19 changes most, then 18, then 17
    chosen = cat_pruning.first_selection(place, even, 64, 64, k, 20)
    assert k == 1228 and asked[:20] == [122] * 20 and even[chosen].bincount()[-10:].tolist() == [122] * 10
    asked.clear()
    frequency = (place[:, 0] >= 921).float()
    chosen = cat_pruning.next_selection(place, even, frequency, k, 20, 0.25)
    assert asked == [183, 122, 122 // 2, 921, 0] and len(chosen) == k          # nothing is left to fill up
    assert (chosen < 921).sum() == 921 and even[chosen[921:]].bincount()[-2:].tolist() == [307 - 183, 183]
    asked.clear()
    small = torch.where(place[:, 0] < 3996, 17 * place[:, 0] // 3900, 18).long()      # 100 and 96 change most
    cat_pruning.next_selection(place, small, frequency, k, 20, 0.25)
    assert asked[:5] == [100, 96, 96 // 2, 61, 61 // 2]


def test_every_token_is_renewed_within_five_pruned_steps():
    """Three quarters of 0.3 N go to those that waited longest: ceil(1 / 0.225) = 5."""
    torch.manual_seed(0)
    labels, frequency, seen = torch.randint(20, (200,)), torch.zeros(200), torch.zeros(200, dtype=torch.bool)
    for _ in range(5):
        chosen = cat_pruning.next_selection(torch.randn(200, 4), labels, frequency, 60, 20, 0.25)
        seen[chosen] = True
        frequency = 0.5 * frequency
        frequency[chosen] += 1
    assert seen.all()


def test_kmeans_finds_separate_groups_and_repeats_itself():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    truth = torch.arange(80) % 4
    x = centres[truth] + 0.1 * torch.randn(80, 2)
    labels = cat_pruning.kmeans(x, 4, seed=1)
    assert len({(int(a), int(b)) for a, b in zip(labels, truth, strict=True)}) == 4
    assert torch.equal(labels, cat_pruning.kmeans(x, 4, seed=1))
    assert cat_pruning.kmeans(torch.ones(6, 2), 3, seed=0).tolist() == [0] * 6  # nothing to tell apart


def test_features_carry_row_and_column():
    noise = torch.ones(6, 4)
    x = cat_pruning.features(noise, 2, 3, 0.05)
    torch.testing.assert_close(x[5], torch.tensor([0.55, 0.55, 0.05 + 2 / 3, 0.05 + 2 / 3]))


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
def test_selecting_every_token_is_the_plain_model(name, monkeypatch):
    monkeypatch.setattr(cat_pruning, "first_selection", lambda delta, *_: torch.arange(len(delta)))
    monkeypatch.setattr(cat_pruning, "next_selection", lambda delta, *_: torch.arange(len(delta)))
    family, pipe = FAMILIES[name], FAMILIES[name].pipe()
    with cat_pruning.apply(pipe, cat_pruning.Config(warmup=2, keep=0.5)) as patch:
        torch.testing.assert_close(family.run(pipe, steps=5), family.run(family.pipe(), steps=5), atol=1e-4, rtol=1e-4)
        assert patch.report()["pruned"] == 3


def test_what_a_pruned_step_costs():
    """Of three DiT blocks, linear layers scale with the selected tokens, and attention with their queries."""
    family, costs, (tokens, k, width) = FAMILIES["dit"], [], (64, 19, 32)
    for warmup in (2, 3):
        pipe = family.pipe()
        with cat_pruning.apply(pipe, cat_pruning.Config(warmup=warmup)):
            costs.append(count_macs(lambda pipe=pipe: family.run(pipe, steps=3)))
    linear = (4 + 8) * width ** 2                                              # queries, keys, values, output; feed-forward
    assert costs[1] - costs[0] == 2 * 3 * (tokens - k) * (linear + 2 * tokens * width)


def test_after_a_change_of_batch_the_selection_starts_anew():
    model, generator = FAMILIES["sd3"].pipe().transformer, torch.Generator().manual_seed(0)
    text, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 5, 16), (2, 16)))
    with cat_pruning.apply(model, cat_pruning.Config(warmup=2)) as patch:
        pruned = []
        for i, batch in enumerate((2, 2, 2, 1, 1, 1, 1)):                      # guidance ends
            x = torch.randn(1, 4, 16, 16, generator=generator).repeat(batch, 1, 1, 1)
            model(x, text[-batch:], pooled[-batch:], torch.tensor([900.0 - i]).expand(batch))
            pruned.append(patch.report().get("pruned", 0))
    assert pruned == [0, 0, 1, 1, 1, 2, 3]


def test_a_small_share_keeps_a_token_and_a_share_of_noise():
    pipe, outs = FAMILIES["sd3"].pipe(), []
    pipe.transformer.register_forward_hook(lambda _, args, out: outs.append(out[0]))
    with cat_pruning.apply(pipe, cat_pruning.Config(warmup=2, keep=0.001)):
        FAMILIES["sd3"].run(pipe, steps=3)
    assert (outs[2] != outs[1]).any(1).sum() == 2 * 4                          # one patch of four cells in both branches
    torch.manual_seed(0)
    delta, labels, frequency = torch.randn(64, 4), torch.arange(64) // 16, torch.ones(64)
    delta[16:32] *= 10
    frequency[50:] = 0.0                                                       # 14 of 19 go to those that wait
    best = 16 + delta[16:32].norm(dim=1).argsort(descending=True)[:3]
    assert set(best.tolist()) <= set(cat_pruning.next_selection(delta, labels, frequency, 19, 4, 0.25).tolist())


@pytest.mark.parametrize("setting", [dict(warmup=99), dict(keep=0.999, warmup=2)])
def test_computing_everything_is_the_plain_model(setting):
    """A warm-up that never ends is the plain model; a selection of all but a token or so differs, yet little is stale."""
    family = FAMILIES["pixart"]
    pipe = family.pipe()
    with cat_pruning.apply(pipe, cat_pruning.Config(**setting)):
        assert torch.equal(family.run(pipe, steps=4), family.run(family.pipe(), steps=4)) == ("keep" not in setting)


@pytest.mark.parametrize("wrong, named", [({"keep": 0.0}, "keep=0.0"), ({"warmup": 1}, "warmup=1"),
                                          ({"decay": 2.0}, "decay=2.0"), ({"clusters": 0}, "clusters=0")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        cat_pruning.Config(**wrong)
