"""Tempered losses against closed forms: with q = p_t every draw has the loss -log Z_t."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import (
    conjugate_normal,
    half_cauchy_scale,
    mixture,
    mixture_log_joint,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from torch import Tensor

from pyro_adaann import AutoPlanar, Path, TemperedTrace_ELBO
from pyro_adaann.annealing.paths import BRIDGE, JOINT, LIKELIHOOD, get_path
from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.objectives.traces import draw_log_factors, log_factors, traces_seen

pytestmark = pytest.mark.any_device

PATHS = ["joint", "likelihood", "bridge"]
TEMPERATURES = [0.05, 0.2, 0.5, 0.99]


def log_weights(model, guide, path: str, t: float, *args, num_particles: int = 64) -> Tensor:
    """Return log p_t - log q of single draws, through the effect handlers."""
    tempering = Tempering(model, guide, get_path(path), t)
    values = []
    for _ in range(num_particles):
        guide_trace = poutine.trace(tempering.guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(tempering.model, trace=guide_trace)).get_trace(*args)
        values.append(model_trace.log_prob_sum() - guide_trace.log_prob_sum())
    return torch.stack(values).detach()


def normal_guide(problem, path: str, t: float) -> AutoDiagonalNormal:
    """A guide that is the closed-form tempered posterior (its base is N(0, 1))."""
    mean, sd = problem.tempered(path, t, base=(0.0, 1.0))
    guide = AutoDiagonalNormal(problem.model)
    guide()
    set_normal(guide, mean, sd)
    return guide


def set_normal(guide: AutoDiagonalNormal, mean: Tensor, sd: float) -> None:
    guide.loc.data.copy_(mean)
    guide.scale = torch.full_like(mean, sd)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_closed_form_tempered_posterior_has_a_constant_loss(path, t):
    problem = conjugate_normal()
    weights = log_weights(problem.model, normal_guide(problem, path, t), path, t)
    # Constant to rounding; with a wrong weight the sd is of order 1 (checked in the next test).
    assert weights.std() < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_other_temperatures_do_not(path):
    problem = conjugate_normal()
    guide = normal_guide(problem, path, 0.5)
    assert log_weights(problem.model, guide, path, 0.45).std() > 0.01


@pytest.mark.parametrize("path", PATHS)
def test_weights_of_the_terms(path):
    problem = conjugate_normal()
    guide, t = normal_guide(problem, "joint", 1.0), 0.3
    pyro.set_rng_seed(1)
    actual = log_weights(problem.model, guide, path, t, num_particles=1)
    pyro.set_rng_seed(1)
    z = guide()["z"].detach()
    log_q = dist.Normal(guide.loc, guide.scale).log_prob(z).sum()
    log_base = dist.Normal(0.0, 1.0).log_prob(z).sum()
    log_prior, log_likelihood = problem.log_prior(z), problem.log_likelihood(z)
    expected = {
        "joint": t * log_prior + t * log_likelihood,
        "likelihood": log_prior + t * log_likelihood,
        "bridge": t * log_prior + t * log_likelihood + (1 - t) * log_base,
    }[path] - log_q
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("make_guide", [AutoDiagonalNormal, lambda m: AutoPlanar(m, 4)])
def test_all_paths_agree_at_one(make_guide):
    problem = conjugate_normal()
    guide = make_guide(problem.model)
    losses = []
    for path in PATHS:
        elbo = TemperedTrace_ELBO(1.0, path=path, num_particles=7, vectorize_particles=True)
        guide()
        pyro.set_rng_seed(3)
        losses.append(elbo.loss(problem.model, guide))
    pyro.set_rng_seed(3)
    plain = Trace_ELBO(num_particles=7, vectorize_particles=True)
    assert losses == [plain.loss(problem.model, guide)] * 3


def lognormal_guide(data: Tensor) -> None:
    loc = pyro.param("AutoNormal.locs.scale", torch.tensor(0.0))
    scale = pyro.param("AutoNormal.scales.scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("scale", dist.LogNormal(loc, scale))


@pytest.mark.parametrize("t", [0.01, 0.5])
def test_coordinates_are_unconstrained_whoever_reports_the_jacobian(t):
    # u = log scale: (p(scale) p(x | scale) scale)^t, for the autoguide with its Delta and for a guide
    # that samples the scale itself.
    data = torch.tensor([0.3, -1.2, 2.0])
    autoguide = AutoNormal(half_cauchy_scale)
    autoguide(data)
    for guide in (autoguide, lognormal_guide):
        pyro.set_rng_seed(5)
        actual = log_weights(half_cauchy_scale, guide, "joint", t, data, num_particles=1)
        pyro.set_rng_seed(5)
        u = poutine.trace(guide).get_trace(data).nodes["scale"]["value"].log().detach()
        params = pyro.get_param_store()
        loc = params["AutoNormal.locs.scale"].detach()
        scale = params["AutoNormal.scales.scale"].detach()
        log_joint = dist.HalfCauchy(1.0).log_prob(u.exp()) + u
        log_joint = log_joint + dist.Normal(0.0, u.exp()).log_prob(data).sum()
        expected = t * log_joint - dist.Normal(loc, scale).log_prob(u)
        assert actual.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["auto", "by hand", "planar"])
def test_half_cauchy_prior_stays_finite_at_a_small_inverse_temperature(kind):
    data = torch.tensor([0.3, -1.2, 2.0])
    guide = {
        "auto": lambda: AutoNormal(half_cauchy_scale),
        "by hand": lambda: lognormal_guide,
        "planar": lambda: AutoPlanar(half_cauchy_scale, 8),
    }[kind]()
    # In log coordinates the tail falls by exp(-4 t x): at .01, three draws in a hundred would overflow exp.
    elbo = TemperedTrace_ELBO(0.05, num_particles=10, vectorize_particles=True)
    svi = SVI(half_cauchy_scale, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    losses = [svi.step(data) for _ in range(1500)]
    # In constrained coordinates the tempered density, s^(-5 t) far out, has no integral.
    assert all(map(math.isfinite, losses))
    assert abs(losses[-1]) < 100


def test_factor_sites_count_as_likelihood():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("extra", -(z**2))

    guide = AutoDiagonalNormal(model)
    guide()
    # prior * exp(-z^2)^t = N(0, 1 / (1 + 2t))
    t = 0.3
    set_normal(guide, torch.zeros(1), (1 + 2 * t) ** -0.5)
    assert log_weights(model, guide, "likelihood", t).std() < 1e-5


DATA = torch.tensor([-1.0, 0.5, 2.0, 2.5])


def test_enumeration_tempers_the_sum_over_the_discrete_site():
    guide = AutoDiagonalNormal(poutine.block(mixture, hide=["k"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    t = 0.35
    for path in (JOINT, LIKELIHOOD):
        tempering = Tempering(mixture, guide, path, t)
        guide(DATA)
        pyro.set_rng_seed(2)
        loss = elbo.loss(tempering.model, tempering.guide, DATA)
        pyro.set_rng_seed(2)
        locs = guide(DATA)["locs"].detach()
        log_q = dist.Normal(guide.loc, guide.scale).log_prob(locs).sum()
        log_prior = dist.Normal(0.0, 3.0).log_prob(locs).sum()
        log_sum = mixture_log_joint(locs, DATA) - log_prior
        prior_weight = path.prior_weight(t)
        expected = log_q - prior_weight * log_prior - t * log_sum
        assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("path", [JOINT, LIKELIHOOD])
@pytest.mark.parametrize("vectorize", [False, True])
def test_log_factors_under_enumeration_are_those_of_the_marginal(path, vectorize):
    guide = AutoDiagonalNormal(poutine.block(mixture, hide=["k"]))
    guide(DATA)
    tempering = Tempering(mixture, guide, path, 0.4)
    seen = []

    def look(model_trace, guide_trace):
        seen.append((log_factors(tempering, model_trace, guide_trace), guide_trace.nodes["locs"]["value"]))

    elbo = TraceEnum_ELBO(num_particles=5, vectorize_particles=vectorize, max_plate_nesting=1)
    with traces_seen(elbo, look):
        elbo.loss(tempering.model, tempering.guide, DATA)
    actual = torch.cat([draws for draws, _ in seen])
    locs = torch.cat([value.reshape(-1, 2) for _, value in seen]).detach()
    expected = mixture_log_joint(locs, DATA)
    if path is LIKELIHOOD:
        expected = expected - dist.Normal(0.0, 3.0).log_prob(locs).sum(-1)
    assert actual.shape == (5,)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_guide_enumeration_is_drawn_for_the_variance():
    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=data)

    def guide(data: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    elbo = TraceEnum_ELBO(num_particles=20, max_plate_nesting=0, strict_enumeration_warning=False)
    tempering = Tempering(model, guide, JOINT, 0.3)
    draws = draw_log_factors(elbo, tempering, (torch.tensor(0.5),), {})
    assert draws.shape == (2, 20)
    assert torch.isfinite(draws).all()


@pytest.mark.parametrize("path", [JOINT, LIKELIHOOD, BRIDGE, Path("half", 0.5, 0.2)])
@pytest.mark.parametrize("elbo_type", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("vectorize", [False, True])
def test_log_factor_is_the_derivative_of_log_p_t(path, elbo_type, vectorize):
    problem = conjugate_normal()
    guide = normal_guide(problem, "joint", 1.0)
    draws, rates = [], []
    for t in (0.4, 0.6):
        tempering = Tempering(problem.model, guide, path, t)

        def look(model_trace, guide_trace, tempering=tempering):
            rates.append(log_factors(tempering, model_trace, guide_trace))
            draws.append(model_trace.log_prob_sum() - guide_trace.log_prob_sum())

        elbo = elbo_type(num_particles=6, vectorize_particles=vectorize, max_plate_nesting=1)
        pyro.set_rng_seed(4)
        with traces_seen(elbo, look):
            elbo.loss(tempering.model, tempering.guide)
    # log p_t is linear in t on a path, and log q does not depend on it.
    half = len(rates) // 2
    first, second = torch.cat(rates[:half]), torch.cat(rates[half:])
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    difference = sum(draws[half:]) - sum(draws[:half])
    torch.testing.assert_close(first.sum(), (difference / 0.2).detach(), rtol=1e-3, atol=1e-3)


def test_log_factors_of_particles_are_single_values_on_every_plate():
    problem = conjugate_normal(dim=1)
    guide = normal_guide(problem, "joint", 1.0)
    tempering = Tempering(problem.model, guide, JOINT, 0.5)
    seen = []
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    with traces_seen(elbo, lambda m, g: seen.append((log_factors(tempering, m, g), g.nodes["z"]["value"]))):
        elbo.loss(tempering.model, tempering.guide)
    ((draws, z),) = seen
    z = z.reshape(4, 1).detach()
    expected = problem.log_prior(z) + problem.log_likelihood(z)
    torch.testing.assert_close(draws, expected, rtol=1e-4, atol=1e-4)


def test_tempered_elbo_with_svi_finds_the_tempered_posterior():
    problem, t = conjugate_normal(dim=1), 0.2
    guide = AutoNormal(problem.model)
    elbo = TemperedTrace_ELBO(t, num_particles=20, vectorize_particles=True)
    svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(800):
        svi.step()
    mean, sd = problem.tempered("joint", t, base=(0.0, 1.0))
    store = pyro.get_param_store()
    # The residual noise of Adam at lr 0.01 is about 0.01 here; a missing factor t is 0.4 in the sd.
    assert store["AutoNormal.locs.z"].item() == pytest.approx(mean.item(), abs=0.06)
    assert store["AutoNormal.scales.z"].item() == pytest.approx(sd, rel=0.08)


def test_guide_list_on_the_bridge():
    problem = conjugate_normal()

    def model() -> None:
        problem.model()
        pyro.sample("other", dist.Normal(1.0, 1.0))

    guide = AutoGuideList(model)
    guide.append(AutoPlanar(poutine.block(model, expose=["z"]), 3))
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["other"])))
    guide()
    t = 0.25
    pyro.set_rng_seed(1)
    actual = log_weights(model, guide, "bridge", t, num_particles=1)
    pyro.set_rng_seed(1)
    trace = poutine.trace(guide).get_trace()
    z, other = (trace.nodes[name]["value"].detach() for name in ("z", "other"))
    log_q = trace.log_prob_sum()
    log_base = guide[0].get_base_dist().log_prob(z) + dist.Normal(0.0, 1.0).log_prob(other)
    log_joint = problem.log_prior(z) + problem.log_likelihood(z)
    log_joint = log_joint + dist.Normal(1.0, 1.0).log_prob(other)
    expected = t * log_joint + (1 - t) * log_base - log_q
    assert actual.item() == pytest.approx(expected.item(), rel=1e-4)


def test_subsampling_scales_and_weights_multiply():
    data = torch.arange(10.0)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    trace = poutine.trace(Tempering(model, AutoDelta(model), JOINT, 0.1).model).get_trace()
    assert trace.nodes["x"]["scale"] == pytest.approx(0.1 * 5)
    assert trace.nodes["z"]["scale"] == pytest.approx(0.1)


def test_mean_field_elbo_is_sound_on_the_likelihood_path():
    problem, t = conjugate_normal(dim=1), 0.5
    mean, sd = problem.tempered("likelihood", t, base=(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(mean, sd).to_event(1))

    tempering = Tempering(problem.model, guide, LIKELIHOOD, t)
    exact = -math.log(1.0)
    elbo = TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.loss(tempering.model, tempering.guide)
    constant = -log_weights(problem.model, guide, "likelihood", t)
    assert constant.std() < 1e-4
    # Monte-Carlo error of the likelihood term: t * sd of log p(x | z) / sqrt(4000) is below 0.02.
    assert loss == pytest.approx(constant.mean().item() + exact, abs=0.1)
