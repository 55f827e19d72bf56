"""Masks over tokens: by hand, as the inverse of each other, and as even as random ones must be."""
import pytest
import torch

from methods._core.masking import Masking, highest, mean_over, random_mask

X = torch.arange(24.0).view(2, 4, 3)
BY_HAND = Masking(torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]]), 2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_by_hand():
    assert BY_HAND.kept.tolist() == [[2, 0], [1, 3]]
    assert BY_HAND.masked.tolist() == [[False, True, False, True], [True, False, True, False]]
    assert BY_HAND.keep(X)[..., 0].tolist() == [[6, 0], [15, 21]] and BY_HAND.drop(X)[..., 0].tolist() == [[9, 3], [12, 18]]
    assert BY_HAND.fill(BY_HAND.keep(X), torch.full((3,), -1.0))[..., 0].tolist() == [[0, -1, 6, -1], [-1, 15, -1, 21]]
    assert BY_HAND.put(-BY_HAND.keep(X), X)[..., 0].tolist() == [[0, 3, -6, 9], [12, -15, 18, -21]]


def test_one_row_stands_for_all_sequences():
    assert torch.equal(BY_HAND.keep(X[:1]), BY_HAND.keep(X[:1].expand(2, -1, -1)))


def test_a_bias_is_cut_on_both_axes():
    bias = torch.arange(32.0).view(2, 4, 4)
    found = BY_HAND.pairs(bias)
    assert found.shape == (2, 2, 2, 2)
    assert found[0].tolist() == [[[10, 8], [2, 0]], [[26, 24], [18, 16]]]
    assert found[1, 0].tolist() == [[5, 7], [13, 15]]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
def test_filling_undoes_keeping_and_dropping(ratio):
    x = torch.randn(3, 17, 5, generator=generator(1), dtype=torch.float64)
    mask = random_mask(3, 17, ratio, generator())
    assert mask.keep(x).shape[1] == int(17 * (1 - ratio))
    assert torch.equal(mask.fill(mask.keep(x), mask.drop(x)), x) and torch.equal(mask.put(mask.keep(x), x), x)
    assert mask.masked.sum(1).tolist() == [17 - int(17 * (1 - ratio))] * 3
    assert torch.equal(mask.put(mask.keep(x), torch.zeros_like(x)), x * ~mask.masked[..., None])


def test_random_masks_are_even_and_come_from_the_generator_alone():
    before = torch.get_rng_state()
    mask = random_mask(4000, 8, 0.5, generator())
    share = (~mask.masked).double().mean(0)
    assert (share - 0.5).abs().max() < 0.03                      # each place, at nearly 4 deviations of 1 / (2 sqrt(4000))
    together = (~mask.masked[:, 0] & ~mask.masked[:, 1]).double().mean()
    assert abs(float(together) - 3 / 14) < 0.03                  # 4 of 8 hold two given ones
    first = torch.bincount(mask.kept[:, 0], minlength=8) / 4000
    assert (first - 1 / 8).abs().max() < 0.02                    # in an order of their own, not that of their places
    assert torch.equal(mask.order, random_mask(4000, 8, 0.5, generator()).order)
    assert not torch.equal(mask.order, random_mask(4000, 8, 0.5, generator(1)).order)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_highest_stay_the_earlier_of_equal_ones_first():
    assert highest(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 3).kept.tolist() == [[1, 3, 2]]


def test_gradients_reach_what_was_kept_and_what_fills():
    x, token = torch.randn(2, 4, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    BY_HAND.fill(BY_HAND.keep(x), token).sum().backward()
    assert torch.equal(x.grad, (~BY_HAND.masked[..., None]).float().expand_as(x)) and token.grad.tolist() == [4, 4, 4]


def test_means_over_either_part():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert mean_over(values, BY_HAND.masked).tolist() == [3, 6] and mean_over(values, ~BY_HAND.masked).tolist() == [2, 7]
    assert mean_over(values, torch.zeros_like(BY_HAND.masked)).tolist() == [0, 0]


@pytest.mark.parametrize("ratio, said", [(-0.1, "ratio=-0.1"), (1.0, "ratio=1.0"), (float("nan"), "ratio=nan"),
                                         (0.9, "0 of 4 tokens cannot stay")])
def test_what_leaves_no_token_is_refused(ratio, said):
    with pytest.raises(ValueError, match=said):
        random_mask(1, 4, ratio, generator())
    with pytest.raises(ValueError, match="5 of 4 tokens cannot stay"):
        highest(torch.zeros(1, 4), 5)
