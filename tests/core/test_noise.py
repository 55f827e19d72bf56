"""The forward process of a scheduler, against the scheduler itself and against integrals worked out by hand."""
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
)

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
    kept = (1 - noising.process.betas).cumprod(0)[t]
    full = torch.full((1, 1, 1, 1), x0, dtype=torch.float64)
    noisy = Noisy(kept.sqrt() * full, torch.tensor([t]), full, full * 0, full * 0)
    said, variance = torch.full_like(full, eps_error), torch.full_like(full, float(variance))
    return float(noising.variance_bound(said, variance, noisy)), noising.process.betas, kept


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


# ---- other processes ---------------------------------------------------------------------------------------------------

X0 = torch.randn(6, 3, 4, 4, generator=generator(1), dtype=torch.float64)
PROCESSES = [*(DDPMScheduler(prediction_type=says) for says in SAYS),
             *(EDMEulerScheduler(prediction_type=says) for says in SAYS[:2]),
             FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)]


@pytest.mark.parametrize("scheduler", PROCESSES, ids=lambda each: f"{type(each).__name__}-{each.config.get('prediction_type')}")
def test_the_target_stands_for_the_clean_sample(scheduler):
    noising = Noising(scheduler)
    noisy = noising.sample(X0, generator())
    a, s = noising.levels(noisy.t, X0)
    torch.testing.assert_close(noisy.x, a * X0 + s * noisy.eps)
    torch.testing.assert_close(noising.denoised(noisy.target, noisy), X0, rtol=1e-6, atol=1e-6)
    assert (noising.denoised(noisy.target + 1, noisy) - X0).abs().min() > 1e-4
    torch.testing.assert_close(noising.snr(noisy.t), (a / s).flatten() ** 2, check_dtype=False)


@pytest.mark.parametrize("says", ["epsilon", "v_prediction"])
def test_preconditioning_is_that_of_edm(says):
    scheduler = EDMEulerScheduler(sigma_data=0.7, prediction_type=says)
    noising = Noising(scheduler)
    noisy, said = noising.sample(X0, generator()), torch.randn(X0.shape, generator=generator(2), dtype=torch.float64)
    sigma = (4 * noisy.t.double()).exp().view(-1, 1, 1, 1)
    y = X0 + sigma * noisy.eps
    torch.testing.assert_close(noisy.t.view(-1, 1, 1, 1), scheduler.precondition_noise(sigma).float())
    torch.testing.assert_close(noisy.x, scheduler.precondition_inputs(y, sigma))
    torch.testing.assert_close(noising.denoised(said, noisy), scheduler.precondition_outputs(y, said, sigma))
    # Its loss, weighted over levels by 1 / c_out^2, is the plain error of what the network says.
    weight = (sigma ** 2 + 0.49) / (sigma * 0.7) ** 2
    expected = (weight * (noising.denoised(said, noisy) - X0) ** 2).mean()
    torch.testing.assert_close(noising.loss(said, noisy), expected)


def test_levels_of_edm_are_log_normal():
    t = Noising(EDMEulerScheduler()).sample(torch.zeros(4000, 1), generator()).t
    log_sigma = 4 * t.double()
    assert (float(log_sigma.mean()), float(log_sigma.std())) == pytest.approx((-1.2, 1.2), abs=0.01)
    assert float((log_sigma < 0).double().mean()) == pytest.approx(0.8413, abs=0.001)           # a spread above the mean
    assert t.isfinite().all() and len(t.unique()) == 4000


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_that_of_the_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    t = scheduler.timesteps[[0, 500, 999]]
    torch.testing.assert_close(Noising(scheduler).process.t(torch.tensor([1.0, 0.5, 0.001])), t)
    noisy = Noising(scheduler).sample(X0[:3].float(), generator(), t)
    torch.testing.assert_close(noisy.x, scheduler.scale_noise(X0[:3].float(), t, noisy.eps))
    assert torch.equal(noisy.t, t)
    torch.testing.assert_close(noisy.target, noisy.eps - X0[:3].float())


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler(shift=2.0)],
                         ids=["edm", "flow"])
def test_a_step_of_the_scheduler_along_the_target_stays_on_the_way_to_the_sample(scheduler):
    """From its second level to its third, with what a perfect model says."""
    noising, eps = Noising(scheduler), torch.randn(1, 3, 4, 4, generator=generator(3), dtype=torch.float64)
    scheduler.set_timesteps(5)
    edm = isinstance(scheduler, EDMEulerScheduler)
    sigma, below, t = scheduler.sigmas[1].double(), scheduler.sigmas[2].double(), scheduler.timesteps[1:2]
    a, s = noising.levels(t, eps)
    target = noising.process.target(X0[:1], eps, a, s)
    start = X0[:1] + sigma * eps if edm else (1 - sigma) * X0[:1] + sigma * eps
    after = scheduler.step(target, scheduler.timesteps[1], start).prev_sample
    torch.testing.assert_close(after.double(), X0[:1] + below * eps if edm else (1 - below) * X0[:1] + below * eps,
                               rtol=1e-4, atol=1e-4 * float(below))


def test_two_passes_may_share_their_timesteps():
    noising, random = Noising(DDIMScheduler()), generator()
    first = noising.sample(X0, random)
    second = noising.sample(X0, random, first.t)
    assert torch.equal(first.t, second.t) and not torch.equal(first.eps, second.eps)


def test_a_shift_by_the_size_of_an_image_is_left_out():
    t = Noising(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)).process.t(torch.tensor([0.5]))
    assert t.tolist() == [500]


def test_what_it_cannot_do_is_refused():
    for scheduler, said in ((KarrasVeScheduler(), "KarrasVeScheduler has no noise levels that are known"),
                            (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "the other way round"),
                            (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "predicts flow_prediction")):
        with pytest.raises(ValueError, match=said):
            Noising(scheduler)
    noisy = Noising(DDIMScheduler()).sample(torch.zeros(2, 3, 2, 2), generator())
    for scheduler, says, channels in ((DDIMScheduler(), "epsilon", 4), (DDIMScheduler(prediction_type="v_prediction"),
                                      "v_prediction", 6), (EDMEulerScheduler(), "those without a variance", 6)):
        with pytest.raises(ValueError, match=f"{channels} channels does not fit 3 of {says}"):
            Noising(scheduler).loss(torch.zeros(2, channels, 2, 2), noisy)
