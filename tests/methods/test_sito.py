import pytest
import torch
from contracts import patch as contract
from families import FAMILIES

from accel_kernels.similarity_sum import similarity_sum
from methods import sito


@pytest.mark.parametrize("check, case", contract.cases(sito, sito.Config(ratio=0.5)), ids=contract.name)
def test_contract(check, case):
    check(case)


def cosines(x):
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.mT


def test_worked_by_hand():
    x = torch.tensor([[[1.0, 0], [1, 0], [0.6, 0.8], [1, 1]]])             # 2 x 2 grid
    score = similarity_sum(x)
    torch.testing.assert_close(score, torch.tensor([[3.30711, 3.30711, 3.18995, 3.40416]]), atol=1e-5, rtol=0)
    base = sito.base_tokens(score, (1, 2, 2), 2)
    assert base.tolist() == [[3]]
    plan = sito.prune_plan(x, base, 0.25)                                  # t2 is the most similar to the base: 0.98995
    assert plan.owner.tolist() == [[0, 1, 3]]
    y = torch.arange(3.0).view(1, 3, 1)
    assert plan.restore(y).flatten().tolist() == [0, 1, 2, 2]


def test_sim_score_is_the_row_sum_of_the_cosine_matrix():
    x = torch.randn(3, 50, 8)
    torch.testing.assert_close(similarity_sum(x), cosines(x).sum(-1), atol=1e-5, rtol=1e-5)


def test_one_base_token_a_full_patch_the_best_one():
    score = torch.randn(2, 2 * 7 * 9)
    base = sito.base_tokens(score, (2, 7, 9), 3)
    expected = []
    for b in range(2):
        maps, found = score[b].view(2, 7, 9), []
        for frame in range(2):
            for y in range(0, 6, 3):
                for x in range(0, 9, 3):
                    places = [frame * 63 + (y + j) * 9 + x + i for j in range(3) for i in range(3)]
                    found.append(max(places, key=lambda place: maps.flatten()[place].item()))
        expected.append(found)
    assert base.tolist() == expected


def test_a_stride_larger_than_the_grid_is_named():
    pipe = FAMILIES["dit"].pipe()
    with sito.apply(pipe, sito.Config(stride=9)), pytest.raises(ValueError, match="stride=9 is more than the grid of 8 x 8"):
        FAMILIES["dit"].run(pipe, steps=1)


@pytest.mark.parametrize("recover_from", ["kept", "base"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_pruning_and_recovery(ratio, recover_from):
    x, y = torch.randn(2, 48, 8), torch.randn(2, 48, 3)
    base = sito.base_tokens(similarity_sum(x), (1, 6, 8), 2)
    plan = sito.prune_plan(x, base, ratio, recover_from)
    P, similarity = min(int(ratio * 48), 36), cosines(x)
    assert plan.segments.length == 48 - P
    rows = plan.drop(y)
    restored = plan.restore(rows)
    for b in range(2):
        kept = plan.owner[b].tolist()
        assert len(set(kept)) == 48 - P and set(base[b].tolist()) <= set(kept)
        assert torch.equal(rows[b], y[b, kept]) and torch.equal(restored[b, kept], y[b, kept])
        others = [i for i in range(48) if i not in base[b]]
        nearest = {i: similarity[b, i, base[b]].max().item() for i in others}
        pruned = sorted(others, key=nearest.get, reverse=True)[:P]
        assert set(kept) == set(range(48)) - set(pruned)
        sources = kept if recover_from == "kept" else base[b].tolist()
        for i in pruned:
            assert torch.equal(restored[b, i], y[b, max(sources, key=lambda j: similarity[b, i, j].item())])


def test_pruning_a_duplicate_changes_nothing_for_a_pointwise_layer():
    half = torch.randn(1, 4, 6, 8)
    x = half.repeat_interleave(2, 1).flatten(1, 2)                          # each token twice, one above the other
    plan = sito.prune_plan(x, sito.base_tokens(similarity_sum(x), (1, 8, 6), 2), 0.25)
    torch.testing.assert_close(plan.restore(plan.drop(x).sin()), x.sin())


def test_noise_moves_the_base_tokens_and_its_absence_does_not():
    family, seen = FAMILIES["dit"], {}
    for alpha, seed in ((0.0, 0), (0.0, 1), (5.0, 0), (5.0, 1)):
        pipe = family.pipe()
        with sito.apply(pipe, sito.Config(alpha=alpha, seed=seed)):
            seen[alpha, seed] = family.run(pipe, steps=2)
    assert torch.equal(seen[0.0, 0], seen[0.0, 1])
    assert not torch.equal(seen[5.0, 0], seen[5.0, 1])


@pytest.mark.parametrize("wrong, named", [({"ratio": 1.2}, "ratio=1.2"), ({"stride": 0}, "stride=0"),
                                          ({"recover_from": "all"}, "recover_from='all'"),
                                          ({"max_downsample": 3}, "max_downsample=3")])
def test_bad_values_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        sito.Config(**wrong)
