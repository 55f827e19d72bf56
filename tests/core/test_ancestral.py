"""Steps back through a table of noise levels: the posterior by hand, and samples of what is known in full."""
import pytest
import torch

from methods._core.ancestral import ancestral, posterior, spaced

KEPT = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_mean_by_hand():
    """abar 0.4 after 0.8: beta = 1/2, so sqrt(0.8) 0.5 / 0.6 of x0 and sqrt(0.5) 0.2 / 0.6 of x."""
    x0, x = torch.tensor([3.0], dtype=torch.float64), torch.tensor([-6.0], dtype=torch.float64)
    expected = 0.8 ** 0.5 * 0.5 / 0.6 * 3 - 0.5 ** 0.5 * 0.2 / 0.6 * 6
    assert float(posterior(x0, x, 0.4, 0.8)) == pytest.approx(expected)
    assert float(posterior(x0, x, 0.4, 1.0)) == pytest.approx(3)


def test_steps_are_spread_from_the_last_to_the_first():
    assert spaced(1000, 1) == [999] and spaced(1000, 2) == [0, 999] and spaced(10, 4) == [0, 3, 6, 9]
    assert spaced(7, 7) == list(range(7))
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"steps={steps} must lie in 1..10"):
            spaced(10, steps)


def test_what_is_known_is_reached():
    x, x0 = torch.randn(2, 3, generator=generator()), torch.arange(6.0).view(2, 3)
    for steps in (1, 3, 30):
        torch.testing.assert_close(ancestral(lambda x, t: (x0, None), x, KEPT, spaced(1000, steps), generator()), x0)


@pytest.mark.parametrize("where, steps, low, high", [(None, 20, 0.35, 0.45), (-1.0, 20, 0.35, 0.45), (1.0, 20, 0.5, 0.62),
                                                     (None, 200, 0.48, 0.52), (1.0, 200, 0.48, 0.52)])
def test_samples_of_a_gaussian_have_its_deviation(where, steps, low, high):
    """Data of deviation 0.5: what is seen in x is its mean given x. The lower bound of the variance gives too little, the upper
    one too much, both less so with more steps."""
    def says(x, t):
        x0 = KEPT[t] ** 0.5 * 0.25 / (KEPT[t] * 0.25 + 1 - KEPT[t]) * x
        return x0, None if where is None else torch.full_like(x, where)
    x = ancestral(says, torch.randn(4000, generator=generator()).double(), KEPT, spaced(1000, steps), generator(1))
    assert low < float(x.std()) < high


def test_draws_come_from_the_generator_alone():
    def draw(seed):
        return ancestral(lambda x, t: (0.5 * x, None), torch.ones(5), KEPT, spaced(1000, 4), generator(seed))
    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(draw(0), first) and not torch.equal(draw(1), first)
