"""The forward process of a scheduler, against the scheduler itself and against integrals worked out by hand."""
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from methods._core.noise import Noising, Noisy, stratified

SAYS = ("epsilon", "v_prediction", "sample")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_levels_of_a_batch_are_spread_evenly():
    assert (stratified(8, generator()) * 8).long().sort().values.tolist() == list(range(8))
    t = Noising(DDIMScheduler()).sample(torch.zeros(20, 1, 2, 2), generator()).t
    assert (t // 50).sort().values.tolist() == list(range(20))


@pytest.mark.parametrize("says", SAYS)
def test_samples_are_those_of_the_scheduler(says):
    scheduler = DDPMScheduler(prediction_type=says)
    x0 = torch.randn(6, 3, 4, 4, generator=generator(1))
    noisy = Noising(scheduler).sample(x0, generator())
    torch.testing.assert_close(noisy.x, scheduler.add_noise(x0, noisy.eps, noisy.t))
    expected = {"epsilon": noisy.eps, "v_prediction": scheduler.get_velocity(x0, noisy.eps, noisy.t), "sample": x0}[says]
    torch.testing.assert_close(noisy.target, expected)
    assert float(Noising(scheduler).loss(noisy.target, noisy)) < 1e-12
    torch.testing.assert_close(Noising(scheduler).loss(noisy.target + 2, noisy), torch.tensor(4.0))


def test_draws_come_from_the_generator_alone():
    x0, before = torch.ones(4, 1, 2, 2), torch.get_rng_state()
    a, b, c = (Noising(DDIMScheduler()).sample(x0, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(a.x, b.x) and torch.equal(a.t, b.t) and not torch.equal(a.x, c.x)
    assert torch.equal(torch.get_rng_state(), before)


def bound(t, variance, eps_error=0.0, x0=0.2):
    """Bits per dimension of one pixel with noise 0 at timestep t, with a prediction off by `eps_error`."""
    noising = Noising(DDPMScheduler())
    kept = (1 - noising.betas).cumprod(0)[t]
    full = torch.full((1, 1, 1, 1), x0, dtype=torch.float64)
    noisy = Noisy(kept.sqrt() * full, torch.tensor([t]), full, full * 0, full * 0)
    said, variance = torch.full_like(full, eps_error), torch.full_like(full, float(variance))
    return float(noising.variance_bound(said, variance, noisy)), noising.betas, kept


def test_a_variance_at_its_lower_bound_costs_nothing_and_any_other_does():
    assert bound(500, -1)[0] == pytest.approx(0, abs=1e-12)
    assert bound(500, 1)[0] > bound(500, 0)[0] > 0


@pytest.mark.parametrize("variance, eps_error", [(1, 0.0), (0, 0.3), (-1, 0.5)])
def test_the_bound_is_the_divergence_of_two_gaussians(variance, eps_error):
    t = 400
    found, betas, kept = bound(t, variance, eps_error)
    before = kept / (1 - betas[t])
    low = betas[t] * (1 - before) / (1 - kept)
    v = low ** ((1 - variance) / 2) * betas[t] ** ((1 + variance) / 2)
    shift = betas[t] / ((1 - betas[t]).sqrt() * (1 - kept).sqrt()) * eps_error          # of the mean, in the form of DDPM
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, low.sqrt()),
                                                 torch.distributions.Normal(shift, v.sqrt()))
    assert found == pytest.approx(float(expected) / math.log(2), rel=1e-6)


def test_the_first_step_is_the_likelihood_of_a_byte():
    """With the mean right, the mass of a Gaussian within half a grey level on each side, up to a tanh for its integral."""
    found, betas, _ = bound(0, 1)
    normal = torch.distributions.Normal(0.0, betas[0].sqrt())
    mass = normal.cdf(torch.tensor(1 / 255)) - normal.cdf(torch.tensor(-1 / 255))
    assert found == pytest.approx(-math.log2(float(mass)), rel=2e-3)
    assert bound(0, 1, x0=1.0)[0] == pytest.approx(-math.log2(float(1 - normal.cdf(torch.tensor(-1 / 255)))), rel=2e-3)
    assert bound(0, 1, x0=-1.0)[0] == pytest.approx(bound(0, 1, x0=1.0)[0])


def test_a_learnt_variance_is_trained_beside_the_mean_and_does_not_move_it():
    noising = Noising(DDPMScheduler())
    noisy = noising.sample(torch.rand(4, 2, 3, 3, generator=generator()) * 2 - 1, generator())
    output = torch.randn(4, 4, 3, 3, generator=generator(3)).requires_grad_()
    noising.loss(output, noisy).backward()
    mean = output.detach()[:, :2].requires_grad_()
    noising.loss(mean, noisy).backward()
    torch.testing.assert_close(output.grad[:, :2], mean.grad)
    assert output.grad[:, 2:].abs().min() > 0


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no table of noise levels"):
        Noising(FlowMatchEulerDiscreteScheduler())
    noisy = Noising(DDIMScheduler()).sample(torch.zeros(2, 3, 2, 2), generator())
    for says, channels in (("epsilon", 4), ("v_prediction", 6)):
        with pytest.raises(ValueError, match=f"{channels} channels does not fit 3 of {says}"):
            Noising(DDIMScheduler(prediction_type=says)).loss(torch.zeros(2, channels, 2, 2), noisy)
