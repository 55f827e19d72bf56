import math

import pytest
import torch
from contracts import patch as contract
from families import FAMILIES, Family
from sequential import in_two_calls

import methods
from accel_tools.measure.macs import count_macs
from accel_tools.measure.tokencache import build
from methods import tokencache
from methods._core import learning
from methods._core.cache import Slot
from methods._core.denoiser import describe
from methods._core.noise import Noising
from methods._trained import weights_card
from methods.tokencache import TRAINED, Config, Predictor

CHAINED = ["dit", "pixart", "sd3", "flux", "latte", "cogvideox"]


@pytest.mark.parametrize("check, case", contract.cases(tokencache, Config()), ids=contract.name)
def test_contract(check, case):
    check(case)


# ---- the equations ----------------------------------------------------------------------------------------------------

def test_kept_tokens_by_hand():
    w = torch.tensor([[.9, .1, .8, .2], [.5, .6, .7, .8]])
    first, second = tokencache.kept(w, Config(ratio=0.5, blocks=0.5))
    assert first.tolist() == [0, 2] and second is None                      # the block with the lower sum is pruned
    assert [each.tolist() for each in tokencache.kept(w, Config(ratio=0.5, blocks=1.0))] == [[0, 2], [2, 3]]
    marked = tokencache.kept(w, Config(ratio=0.5, version=2))
    assert [each.tolist() for each in marked] == [[0, 2], [2, 3]]
    marked = tokencache.kept(w - torch.tensor([[0.], [1.]]), Config(ratio=0.75, version=2))
    assert [each.tolist() for each in marked] == [[0, 2], []]


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.75, 1.0])
def test_the_second_version_marks_a_share_of_all_tokens(ratio):
    w = torch.rand(7, 30, generator=torch.Generator().manual_seed(0))
    found = tokencache.kept(w, Config(ratio=ratio, version=2))
    assert sum(map(len, found)) == 210 - round(210 * ratio)
    assert sum(1 - len(each) / 30 for each in found) / 7 == pytest.approx(ratio, abs=1 / 210)
    best = set(w.flatten().sort(descending=True).indices[:210 - round(210 * ratio)].tolist())
    assert {30 * block + place for block, each in enumerate(found) for place in each.tolist()} == best


def test_full_steps():
    assert tokencache.full_steps(12, Config()) == {0, 2, 4, 6, 9}
    assert tokencache.full_steps(5, Config(periods=(1, 4), switch=0.4)) == {0, 1, 2}
    even = tokencache.full_steps(12, Config(version=2), [1.0] * 12)
    assert even == {0, 2, 5, 8}
    late = tokencache.full_steps(12, Config(version=2), [0.01] * 6 + [1.0] * 6)
    assert late == {0, 7, 8, 10}


def test_superposition():
    new, old = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    assert torch.equal(tokencache.superpose(torch.ones(4), new, old), new)
    assert torch.equal(tokencache.superpose(torch.zeros(4), new, old), old)
    w = torch.tensor([.25, .5, .75, 1.])
    for i in range(4):
        torch.testing.assert_close(tokencache.superpose(w, new, old)[:, i], w[i] * new[:, i] + (1 - w[i]) * old[:, i])


@pytest.mark.parametrize("version, expected", [(1, [5.0, 8.5]), (2, [5.5, 8.5])])
def test_what_is_cached(version, expected):
    """A block takes 3 to 5. Where 3.5 comes next, a token that is copied gives 5, or 3.5 + 2; the other is computed."""
    pipe = FAMILIES["dit"].pipe(layers=1)
    layer = tokencache._Layer(describe(pipe.transformer).blocks[0], Slot(), version == 2)
    calls = iter([torch.full((1, 2, 4), 5.0), torch.full((1, 1, 4), 8.5)])

    def forward(x, **_):
        return next(calls)
    layer.around(forward, torch.full((1, 2, 4), 3.0))
    layer.index = torch.tensor([[1]])
    out = layer.around(forward, torch.full((1, 2, 4), 3.5))
    assert out[0, :, 0].tolist() == expected
    assert layer.slot.get()[0, :, 0].tolist() == ([5.0, 8.5] if version == 1 else [2.0, 5.0])


# ---- whole runs -------------------------------------------------------------------------------------------------------

def by_hand(pipe, config, predictor, steps, grid):
    """Blocks of one stream with lists of kept tokens and caches of their own, token by token."""
    blocks, times = pipe.transformer.transformer_blocks, []
    cache, step = {}, [-1]

    def plan(i):
        t = times[i]
        w = predictor(t, grid)
        n = w.shape[1]
        if config.version == 1:
            phase = math.ceil(config.switch * steps)
            full = i % config.periods[0] == 0 if i < phase else (i - phase) % config.periods[1] == 0
            order = sorted(range(len(blocks)), key=lambda each: float(w[each].sum()))[:round(config.blocks * len(blocks))]
            count = n - round(config.ratio * n)
            chosen = {each: sorted(sorted(range(n), key=lambda k, each=each: -float(w[each, k]))[:count]) for each in order}
        else:
            sums = [float(predictor(t, grid).sum()) for t in times]
            running, at = 0.0, []
            for k, each in enumerate(sums):
                running += each / sum(sums)
                at.append((running, k))
            count = math.ceil(steps / config.periods[1])
            full = i in {0, *(next(k for total, k in at if total >= m / count - 1e-12) for m in range(1, count))}
            places = sorted((-float(w[b, k]), b, k) for b in range(len(blocks)) for k in range(n))
            chosen = {b: [] for b in range(len(blocks))}
            for _, b, k in places[:n * len(blocks) - round(config.ratio * n * len(blocks))]:
                chosen[b].append(k)
            chosen = {b: sorted(each) for b, each in chosen.items()}
        return {} if full else chosen

    def wrap(place, forward):
        def run(x, *args, **kwargs):
            step[0] += place == 0
            chosen = plan(step[0]).get(place)
            if chosen is None:
                out = forward(x, *args, **kwargs)
                cache[place] = out if config.version == 1 else out - x
                return out
            values = cache[place].clone()
            if chosen:
                made = forward(x[:, chosen], *args, **kwargs)
                for row, k in enumerate(chosen):
                    values[:, k] = made[:, row] if config.version == 1 else made[:, row] - x[:, k]
            cache[place] = values
            return values if config.version == 1 else x + values
        return run
    for place, block in enumerate(blocks):
        block.forward = wrap(place, block.forward)
    return times


@pytest.mark.parametrize("name", ["dit", "pixart"])
@pytest.mark.parametrize("config", [Config(seed=1), Config(ratio=0.4, blocks=0.5, periods=(3, 4), switch=0.3),
                                    Config(version=2), Config(version=2, ratio=0.9, periods=(1, 5))])
def test_whole_runs_equal_a_program_by_hand(name, config):
    family = FAMILIES[name]
    for size in dict.fromkeys(family.sizes):
        pipe, other = family.pipe(layers=4), family.pipe(layers=4)
        with tokencache.apply(pipe, config) as patch:
            ours = family.run(pipe, steps=7, size=size, batch=2)
            assert patch.report()["cached"] > 0
        grid = (1, 8, 8) if size in (None, (32, 32)) else (1, 8, 12)
        times = by_hand(other, config, Predictor(4, seed=config.seed), 7, grid)
        other.scheduler.set_timesteps(7)
        times += other.scheduler.timesteps.tolist()
        torch.testing.assert_close(ours, family.run(other, steps=7, size=size, batch=2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", CHAINED)
def test_computing_all_tokens_changes_nothing(name, version):
    family = FAMILIES[name]
    pipe = family.pipe()
    with tokencache.apply(pipe, Config(version=version, ratio=1e-9)) as patch:
        out = family.run(pipe, steps=5)
        assert patch.report()["cached"] == 0
    torch.testing.assert_close(out, family.run(family.pipe(), steps=5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["dit", "sd3", "cogvideox"])
def test_guidance_in_two_calls_gives_the_same(name, version):
    family, outs = FAMILIES[name], []
    for twice in (False, True):
        pipe = family.pipe()
        Family.model(pipe).double()
        with tokencache.apply(pipe, Config(version=version)):
            if twice:
                in_two_calls(pipe)
            outs.append(family.run(pipe, steps=6))
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-6)


def test_what_a_pruned_block_costs():
    """Projections and MLP by the share of kept tokens, the attention map by its square."""
    pipe = FAMILIES["dit"].pipe(layers=1)
    block = describe(pipe.transformer).blocks[0].module
    time, label = torch.tensor([5]), torch.tensor([1])

    def macs(tokens):
        x = torch.randn(1, tokens, 32)
        return count_macs(lambda: block(x, timestep=time, class_labels=label))
    fixed = macs(64) - 64 * 12 * 32 ** 2 - 2 * 64 ** 2 * 32
    assert fixed > 0 and macs(16) == fixed + 16 * 12 * 32 ** 2 + 2 * 16 ** 2 * 32


# ---- training ---------------------------------------------------------------------------------------------------------

def pair(model, seed=0):
    random = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, 4, 16, 16, generator=random), torch.randn(2, 4, 16, 16, generator=random)
    return [dict(hidden_states=a * x + (1 - a) * eps, timestep=torch.tensor([t, t]), class_labels=torch.tensor([1, 2]))
            for a, t in ((0.5, 500), (0.6, 450))]


class Fixed(torch.nn.Module):
    """Scores that are all the same."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(float(value)))

    def forward(self, t, grid):
        return self.value.expand(3, math.prod(grid))


@pytest.mark.parametrize("version", [1, 2])
def test_the_loss_of_all_and_of_nothing(version):
    model, config = FAMILIES["dit"].pipe().transformer, Config(version=version)
    one = tokencache.loss(model, Fixed(1), *pair(model), 450, (1, 8, 8), config, cost=0.25)
    left = 1 - 0.75 ** 2 if version == 1 else 0.25
    assert one["error"].item() == pytest.approx(0, abs=1e-12) and one["loss"].item() == pytest.approx(0.25 * (1 - left) ** 2)
    none = tokencache.loss(model, Fixed(0), *pair(model), 450, (1, 8, 8), config, cost=0.25)
    assert none["loss"].item() == pytest.approx(none["error"].item() + 0.25 * left ** 2)
    if version == 1:                                          # all is as in the step before: the whole of the change
        assert none["error"].item() == pytest.approx(1, rel=1e-5)


def test_the_loss_by_hand():
    model, config, w = FAMILIES["dit"].pipe().transformer, Config(), Predictor(3, seed=2)
    before, now = pair(model)
    blocks, seen = model.transformer_blocks, []
    handles = [block.register_forward_hook(lambda m, args, out: seen.append(out)) for block in blocks]
    model(**before)
    model(**now)
    for handle in handles:
        handle.remove()
    given, last = seen[:3], seen[5]
    x, scores = model.pos_embed(now["hidden_states"]), w(450, (1, 8, 8))
    for n, block in enumerate(blocks):
        made = block(x, timestep=now["timestep"], class_labels=now["class_labels"])
        x = torch.stack([scores[n, k] * made[:, k] + (1 - scores[n, k]) * given[n][:, k] for k in range(64)], 1)
    error = (x - last).square().mean() / (seen[2] - last).square().mean()
    found = tokencache.loss(model, w, before, now, 450, (1, 8, 8), config, cost=0.5)
    assert found["error"].item() == pytest.approx(error.item(), rel=1e-4)
    assert found["loss"].item() == pytest.approx((error + 0.5 * (scores.mean() - 0.4375) ** 2).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_only_the_predictor_trains(name):
    family = FAMILIES[name]
    model, predictor = family.pipe().transformer.requires_grad_(True), Predictor(3)
    before, now = pair(model)
    if name == "sd3":
        more = dict(encoder_hidden_states=torch.randn(2, 5, 16), pooled_projections=torch.randn(2, 16))
        before, now = ({k: v for k, v in each.items() if k != "class_labels"} | more for each in (before, now))
    model.requires_grad_(False)
    tokencache.loss(model, predictor, before, now, 450, (1, 8, 8))["loss"].backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in predictor.parameters())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("version", [1, 2])
def test_a_few_steps_of_training_lower_the_loss(version):
    model, predictor = FAMILIES["dit"].pipe().transformer, Predictor(3)
    optimiser, found = torch.optim.Adam(predictor.parameters(), 1e-2), []
    for _ in range(25):
        terms = tokencache.loss(model, predictor, *pair(model), 450, (1, 8, 8), Config(version=version))
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        found.append(terms["loss"].item())
    assert found[-1] < 0.9 * found[0]


# ---- what ships -------------------------------------------------------------------------------------------------------

class Hard(torch.nn.Module):
    """What is computed under the scores of a predictor is 1, what is copied 0."""

    def __init__(self, predictor, config):
        super().__init__()
        self.predictor, self.config = predictor, config

    def forward(self, t, grid):
        w = self.predictor(t, grid)
        out = torch.zeros_like(w)
        for block, places in enumerate(tokencache.kept(w, self.config)):
            out[block, slice(None) if places is None else places] = 1
        return out


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained_scores_choose_better_than_random_ones(name):
    """By the error they were trained for, on digits drawn now: most of the change of a step is in the tokens they choose."""
    pipe, config = methods.tiny("dit"), TRAINED[name]
    pipe.set_progress_bar_config(disable=True)
    labels = torch.tensor([3, 1, 4, 1])
    random = torch.Generator().manual_seed(5)
    x0 = 2 * pipe(labels.tolist(), num_inference_steps=5, generator=random, output_type="pt").images - 1
    trained = build(config)
    learning.load(trained, methods.weights(name))
    noising, eps = Noising(pipe.scheduler), torch.randn(x0.shape, generator=torch.Generator().manual_seed(6))

    def inputs(t):
        times = torch.full((4,), t)
        a, s = noising.levels(times, x0)
        return dict(hidden_states=a * x0 + s * eps, timestep=times, class_labels=labels)

    def error(predictor):
        hard = Hard(predictor, config)
        return sum(tokencache.loss(pipe.transformer, hard, inputs(t + 50), inputs(t), t, (1, 16, 16), config)["error"].item()
                   for t in (100, 350, 600, 850))
    assert all(error(trained) < 0.9 * error(Predictor(6, seed=seed)) for seed in range(3))


@pytest.mark.parametrize("name", TRAINED)
def test_the_cards_bear_out_the_claim(name):
    card, version = weights_card(name), TRAINED[name].version
    found, shown, losses = card["metrics"], card["stages"][0]["shown"], card["loss"][0]
    ours = found[f"version {version}, trained"]
    assert ours["macs_per_image"] < 0.75 * found["plain"]["macs_per_image"] and ours["label_accuracy"] >= 0.95
    assert shown == ["step", "loss", "error", "mean"] and losses[-1][1] < losses[0][1]


def test_a_predictor_is_read_from_a_file(tmp_path):
    predictor = build(TRAINED["tokencache-1"])
    learning.save(predictor, tmp_path / "scores.safetensors")
    assert len(predictor.block) == 6 and sum(weight.numel() for weight in predictor.parameters()) < 5000
    with pytest.raises(ValueError, match="has shape"):
        tokencache.apply(FAMILIES["dit"].pipe(), Config(predictor=tmp_path / "scores.safetensors"))
    with pytest.raises(ValueError, match="the predictor is of 6 blocks, this model has 3"):
        tokencache.apply(FAMILIES["dit"].pipe(), Config(predictor=predictor))
    scores = predictor(500, (1, 8, 8))
    assert scores.shape == (6, 64) and 0 < scores.min() < scores.max() < 1
    assert predictor(500, (2, 4, 6)).shape == (6, 48)


@pytest.mark.parametrize("wrong, named", [
    ({"version": 3}, "version=3"), ({"ratio": -0.1}, "ratio=-0.1"), ({"blocks": 2}, "blocks=2"),
    ({"periods": (0, 2)}, "periods="), ({"switch": 1.5}, "switch=1.5")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Config(**wrong)


def test_what_cannot_be_served_is_refused():
    assert tokencache.apply(FAMILIES["dit"].pipe(), Config(periods=(1, 1))).off
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        tokencache.apply(FAMILIES["dit"].pipe().transformer)
    with pytest.raises(ValueError, match="on a UNet use deepcache"):
        tokencache.apply(FAMILIES["unet"].pipe())
    pipe = FAMILIES["dit"].pipe()
    pipe.transformer.transformer_blocks[0].set_chunk_feed_forward(8, 1)
    with tokencache.apply(pipe), pytest.raises(RuntimeError, match="switch forward chunking off"):
        FAMILIES["dit"].run(pipe)
