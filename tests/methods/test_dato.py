import numpy as np
import pytest
import torch
from contracts import patch as contract
from diffusers import PNDMScheduler
from families import FAMILIES

from methods import dato, sito
from methods._core import search
from methods._core.denoiser import describe

CONFIG = dato.Config(plan=(0, 1, 1, 2, 1, 0))


@pytest.mark.parametrize("check, case", contract.cases(dato, CONFIG), ids=contract.name)
def test_contract(check, case):
    check(case)


def run(config, steps=6, count=()):
    """Latents, report, and how often each of the modules `count(unet)` ran."""
    family, pipe, calls = FAMILIES["unet"], FAMILIES["unet"].pipe(), {}
    handles = [module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
               for name, module in (count(pipe.unet) if count else {}).items()]
    with dato.apply(pipe, config) as patch:
        out = family.run(pipe, steps=steps)
        report = patch.report()
    for handle in handles:
        handle.remove()
    return out, report, calls


def test_shipped_plan_and_other_numbers_of_steps():
    assert len(dato.PLAN) == 50 and dato.PLAN.count(1) == 38 and dato.PLAN.count(0) == 7
    assert [i for i, stage in enumerate(dato.PLAN) if stage == 2] == [6, 16, 21, 29, 40]
    stages = [dato.stage_of((0, 1, 2, 1), i, 4) for i in range(4)]
    assert stages == ["full", "reused", "shallow", "full"]
    assert [dato.stage_of((0, 2), i, 8) for i in range(1, 8)] == ["reused"] * 4 + ["full"] * 3
    for steps in (50, 51):                                                      # DDIM, and PLMS with its one more call
        stages = [dato.stage_of(dato.PLAN, i, steps) for i in range(1, steps)]
        assert stages == [("reused", "shallow", "full")[stage] for stage in dato.PLAN[:steps - 1]]


def test_the_sampler_of_the_paper_reads_the_plan_call_by_call():
    pipe, ran = FAMILIES["unet"].pipe(), []
    pipe.scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: ran.append(len(calls)))
    calls, plan = [], (1, 2, 0, 1, 2, 2, 1)
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with dato.apply(pipe, dato.Config(plan=plan, ratios=(0.0,))):
        FAMILIES["unet"].run(pipe, steps=7)
    assert len(calls) == 8 and ran == [0, *(n for n, stage in enumerate(plan, start=1) if stage == 2)]


def test_only_the_shallowest_depth_runs_on_a_shallow_step():
    def parts(unet):
        last = unet.up_blocks[-1]
        shallow = {"conv_in": unet.conv_in, "resnet": last.resnets[-1], "attention": last.attentions[-1]}
        deep = {"before": last.resnets[-2], "mid": unet.mid_block.resnets[0], "down": unet.down_blocks[0].resnets[0]}
        return shallow | {"conv_out": unet.conv_out} | {name: resnet.conv1 for name, resnet in deep.items()}
    _, report, calls = run(dato.Config(plan=(1, 1, 0, 2, 1), ratios=(0.0,)), count=parts)
    assert (report["full"], report["shallow"], report["reused"]) == (2, 3, 1)
    running, deep = 5, 2
    assert calls == dict(conv_in=running, resnet=running, attention=running, conv_out=running, before=deep, mid=deep, down=deep)


def test_a_step_without_computation_gives_the_last_output_again():
    pipe, outputs = FAMILIES["unet"].pipe(), []
    with dato.apply(pipe, dato.Config(plan=(1, 0, 0, 0), ratios=(0.0,))):
        handle = pipe.unet.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
        FAMILIES["unet"].run(pipe, steps=4)
        handle.remove()
    assert torch.equal(outputs[1], outputs[2]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_shallow_step_is_the_official_block_cache():
    """Against caching written out: every layer from depth 1 on gives again what it gave when it last ran."""
    expected = {}
    pipe = FAMILIES["unet"].pipe()
    unet, last = pipe.unet, pipe.unet.up_blocks[-1]
    keep = [*unet.down_blocks[0].resnets, *unet.down_blocks[0].attentions, *unet.down_blocks[0].downsamplers,
            *unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1], *last.resnets[:-1], *last.attentions[:-1]]
    plan, calls = (1, 1, 2, 1), []

    def cached(module):
        forward, store = module.forward, []

        def around(*args, **kwargs):
            if len(calls) == 0 or plan[len(calls) - 1] == 2:
                store[:] = [forward(*args, **kwargs)]
            return store[0]
        return around
    for module in keep:
        module.forward = cached(module)
    unet.register_forward_hook(lambda *_: calls.append(1))
    expected = FAMILIES["unet"].run(pipe, steps=5)
    out, _, _ = run(dato.Config(plan=(*plan, 1), ratios=(0.0,)), steps=5)
    assert torch.equal(out, expected)


def test_base_tokens_are_those_that_changed_most():
    change = torch.randn(2, 64).abs()
    noise = torch.randn(64)
    assert torch.equal(dato.base_score(None, noise, 0.1, 0.1), noise[None])
    torch.testing.assert_close(dato.base_score(change, noise, 0.5, 0.2), 0.5 * change + 0.2 * noise)
    pipe, outputs = FAMILIES["unet"].pipe(), []
    with dato.apply(pipe, dato.Config(plan=(2,), alpha=0.0, align_guidance=False)):
        block = next(block for block in describe(pipe.unet).blocks if block.level == 0)
        layer = block.attn._patch_site.arounds[0][2].__self__
        handle = pipe.unet.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
        FAMILIES["unet"].run(pipe, steps=3)
        handle.remove()
    moved = (outputs[1] - outputs[0]).abs().mean(1)                        # what the third call knows
    assert len(layer.base) == 2
    for b in range(2):
        for place in layer.base[b].tolist():
            y, x = place // 16 // 2 * 2, place % 16 // 2 * 2
            assert moved[b, y:y + 2, x:x + 2].max() == moved[b].flatten()[place]


def test_aligned_guidance_halves_share_base_tokens():
    pipe = FAMILIES["unet"].pipe()
    with dato.apply(pipe, dato.Config(plan=(2,))):
        block = next(block for block in describe(pipe.unet).blocks if block.level == 0)
        layer = block.attn._patch_site.arounds[0][2].__self__
        FAMILIES["unet"].run(pipe, steps=3, batch=2)
    assert len(layer.base) == 4 and torch.equal(layer.base[:2], layer.base[2:])
    assert not torch.equal(layer.base[0], layer.base[1])


def test_ratios_follow_the_steps_and_pruning_is_sitos(monkeypatch):
    ratios = []
    monkeypatch.setattr(dato, "prune_plan", lambda x, base, ratio: ratios.append(ratio) or sito.prune_plan(x, base, ratio))
    _, report, _ = run(dato.Config(plan=(2,), ratios=(0.3, 0.0, 0.7)), steps=6)
    assert ratios == [0.3] * 2 * 5 + [0.7] * 2 * 5 and report["pruned"] == 20
    ratios.clear()
    _, report, _ = run(dato.Config(plan=(1, 0, 1)), steps=3)                # on a shallow step one block runs
    assert len(ratios) == report["pruned"] == 5 + 1


def scores(monkeypatch, config, steps=3):
    """What each layer is scored by in each step that runs: (change, gamma), and the grid of its base tokens."""
    seen, real, base = [], dato.base_score, dato.base_tokens
    monkeypatch.setattr(dato, "base_score", lambda change, *rest: seen.append([change, rest[1]]) or real(change, *rest))
    monkeypatch.setattr(dato, "base_tokens", lambda score, grid, _: seen[-1].append(grid) or base(score, grid, _))
    run(config, steps=steps)
    return seen


def test_after_a_step_without_computation_only_noise_decides(monkeypatch):
    seen = scores(monkeypatch, dato.Config(plan=(2, 2, 0, 2, 2)), 5)[::5]      # five blocks in each of four calls
    first, second, before, after = (change for change, *_ in seen)
    assert first is second is None and before.any() and not after.any()


def test_the_sign_is_turned_block_by_block_only_if_asked_for(monkeypatch):
    assert {gamma for _, gamma, _ in scores(monkeypatch, dato.Config(plan=(2,)))} == {0.1}
    signs = [gamma for _, gamma, _ in scores(monkeypatch, dato.Config(plan=(2,), random_sign=True))]
    assert all(set(signs[start:start + 5]) == {-0.1, 0.1} for start in (5, 10))         # five blocks in each call


def test_coarser_grids_are_scored_by_the_mean_of_their_pixels(monkeypatch):
    seen = scores(monkeypatch, dato.Config(plan=(2,), max_downsample=2, align_guidance=False), 3)
    call = {grid: change for change, _, grid in seen[-len(seen) // 3:]}
    assert set(call) == {(1, 16, 16), (1, 8, 8)}
    fine, coarse = call[1, 16, 16].view(2, 8, 2, 8, 2), call[1, 8, 8].view(2, 8, 8)
    torch.testing.assert_close(coarse, fine.mean((2, 4)))


# ---- search -----------------------------------------------------------------------------------------------------------

def test_fronts_and_crowding():
    costs = np.array([[1, 5], [2, 2], [5, 1], [3, 3], [6, 6], [2, 2], [np.inf, np.inf]], dtype=float)
    assert search.rank(costs).tolist() == [0, 0, 0, 1, 2, 0, 3]
    distance = search.crowding(np.array([[0.0, 4], [1, 2], [4, 0], [2, 1]]))
    assert distance.tolist() == [np.inf, 2 / 4 + 3 / 4, np.inf, 3 / 4 + 2 / 4]


def test_operators_stay_in_bounds_and_near_their_parents():
    random = np.random.default_rng(0)
    a, b = np.full(2000, 2), np.full(2000, 8)
    child = search.cross(a, b, 10, 15, random)
    assert child.min() >= 0 and child.max() <= 10
    assert (abs(child - 2) <= 1).mean() + (abs(child - 8) <= 1).mean() > 0.95
    assert 0.15 < (child > 5).mean() < 0.35                                # half the genes cross, half of those to the other
    assert (search.cross(a, a, 10, 15, random) == a).all()
    moved = np.stack([search.mutate(np.full(50, 5), 10, 15, random) for _ in range(400)])
    assert moved.min() >= 0 and moved.max() <= 10 and abs(moved.mean() - 5) < 0.02
    assert 0.005 < (moved != 5).mean() < 0.02
    for _ in range(50):
        plan = dato.sparse_plan(50, random)
        assert (plan[:15] < 2).all() and (plan[15:35] == 2).sum() <= 1 and (plan[35:] == 2).sum() <= 1


def toy(plan):
    """Two costs that pull apart: computation, and distance to a plan that computes at the right places."""
    wanted = (2, 0, 0, 2, 0, 0, 2, 0)
    return sum(plan), sum(max(0, w - p) for w, p in zip(wanted, plan, strict=True))


@pytest.mark.slow
def test_search_finds_the_front_of_a_toy_problem():
    found = dato.search(toy, 8, population=20, generations=40)
    assert [sum(costs) for _, costs in found] == [6] * len(found)          # on the front what is not computed is missing
    assert {costs[0] for _, costs in found} == set(range(7))


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    whole, calls = dato.search(toy, 8, population=6, generations=8, seed=3), []

    def failing(plan):
        calls.append(plan)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return toy(plan)
    journal = tmp_path / "plans.jsonl"
    with pytest.raises(KeyboardInterrupt):
        dato.search(failing, 8, population=6, generations=8, seed=3, journal=journal)
    assert len(journal.read_text().splitlines()) == 25                       # every plan is written down when it is judged
    journal.write_text(journal.read_text() + '{"candidate": [0, 1')          # and what was being written is not trusted
    resumed, told = [], []
    again = dato.search(lambda plan: resumed.append(plan) or toy(plan), 8, population=6, generations=8, seed=3,
                        journal=journal, tell=told.append)
    assert again == whole and 0 < len(resumed) == len(told) <= 6 * 8 - 25 and told[0].startswith("26 judged")
    assert dato.search(None, 8, population=6, generations=8, seed=3, journal=journal) == whole


def test_a_plan_that_is_not_allowed_is_not_kept():
    found = dato.search(lambda plan: (np.inf, np.inf) if plan[0] == 2 else toy(plan), 8, population=10, generations=20)
    assert all(plan[0] != 2 for plan, _ in found)


@pytest.mark.parametrize("wrong, named", [({"plan": (0, 12)}, "plan="), ({"plan": ()}, "plan="),
                                          ({"ratios": (1.5,)}, "ratios="), ({"stride": 0}, "stride=0"),
                                          ({"max_downsample": 3}, "max_downsample=3")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        dato.Config(**wrong)
