"""Importance weights and verdicts against posteriors that are known exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import problems
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    SequenceSchedule,
    TemperedTrace_ELBO,
)
from pyro_adaann.diagnostics.diagnose import diagnose
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.importance import importance_draws
from pyro_adaann.diagnostics.lost_parts import LadderReport
from pyro_adaann.diagnostics.thermodynamic import TemperatureNode, ThermodynamicEstimate, integrate
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.weights import effective_sample_size, pareto_smooth, resample, weighted_mean


class Regression:
    """y ~ N(X beta, 1), beta ~ N(0, I); posterior and evidence are normal."""

    def __init__(self, seed: int, num_data: int = 12, num_features: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(num_data, num_features, generator=generator)
        self.y = self.x.sum(-1) + torch.randn(num_data, generator=generator)
        self.covariance = (self.x.T @ self.x + torch.eye(num_features)).inverse()
        self.mean = self.covariance @ self.x.T @ self.y
        marginal = dist.MultivariateNormal(torch.zeros(num_data), self.x @ self.x.T + torch.eye(num_data))
        self.log_evidence = float(marginal.log_prob(self.y))

    def model(self) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([self.x.shape[1]]).to_event(1))
        with pyro.plate("data", len(self.y)):
            pyro.sample("y", dist.Normal((self.x * beta).sum(-1), 1.0), obs=self.y)

    def model_without_plate(self) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([self.x.shape[1]]).to_event(1))
        pyro.sample("y", dist.Normal(beta @ self.x.T, 1.0).to_event(1), obs=self.y)

    def guide(self, scale: float = 1.0, shift: float = 0.0) -> object:
        def guide() -> None:
            normal = dist.MultivariateNormal(self.mean + shift, scale**2 * self.covariance)
            pyro.sample("beta", normal)

        return guide


def normal_guide(loc: float, scale: float, name: str = "z") -> object:
    return lambda: pyro.sample(name, dist.Normal(loc, scale))


def standard_normal(dim: int = 1) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))


# --- the numbers ---


def test_log_evidence_is_within_its_error_as_often_as_it_should():
    # The estimate is normal to good accuracy, so 2 standard errors hold 95.4 % of the cases. Fewer
    # than 16 of 20 would come up in 0.2 % of the choices of seeds.
    hits = 0
    for seed in range(20):
        pyro.set_rng_seed(seed)
        problem = Regression(seed)
        d = diagnose((problem.model_without_plate, problem.guide(1.3, 0.1)), num_samples=2000)
        hits += abs(d.log_evidence - problem.log_evidence) < 2 * d.log_evidence_se
        assert d.log_evidence_se < 0.03
    assert hits >= 16


@pytest.mark.slow
def test_log_evidence_of_fitted_flows():
    # As above; an unreliable fit, which says so itself, counts as a miss.
    hits = 0
    for seed in range(20):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        problem = Regression(seed)
        guide = AutoPlanar(problem.model, num_transforms=8)
        elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
        svi = AdaAnnSVI(
            problem.model,
            guide,
            pyro.optim.Adam({"lr": 0.01}),
            elbo,
            schedule=AdaAnnSchedule(0.2),
            num_initial_steps=200,
            num_final_steps=1000,
        )
        svi.run(progress_bar=False)
        d = diagnose(svi)
        hits += d.has_reliable_weights and (
            abs(d.log_evidence - problem.log_evidence) < 2 * d.log_evidence_se
        )
    assert hits >= 16


def test_gap_and_ess_are_those_of_normal_distributions():
    scale, dim = 1.2, 2

    def guide():
        pyro.sample("z", dist.Normal(0.0, scale).expand([dim]).to_event(1))

    d = diagnose((lambda: standard_normal(dim), guide), num_samples=100_000, batch_size=50_000)
    divergence = dim * (scale**2 - 1 - 2 * math.log(scale)) / 2
    chi_square = (scale**2 / math.sqrt(2 * scale**2 - 1)) ** dim - 1
    assert d.gap == pytest.approx(divergence, abs=5 * d.elbo_se)
    assert d.ess / d.num_samples == pytest.approx(1 / (1 + chi_square), abs=0.005)
    assert d.log_evidence == pytest.approx(0.0, abs=5 * d.log_evidence_se)


def test_log_densities_are_the_models():
    problem = problems.conjugate_normal(2)
    draws = importance_draws((problem.model, AutoNormal(problem.model)), num_samples=70, batch_size=30)
    z = draws.samples["z"]
    assert z.shape == (70, 2)
    expected = problem.log_prior(z) + problem.log_likelihood(z)
    torch.testing.assert_close(draws.log_p.float(), expected, rtol=1e-5, atol=1e-4)


def test_enumerated_sites_are_summed_out():
    data = torch.linspace(-2.0, 3.0, 6)
    guide = AutoNormal(poutine.block(problems.mixture, hide=["k"]))
    for vectorize in (True, False):
        draws = importance_draws((problems.mixture, guide), data, num_samples=50, vectorize=vectorize)
        expected = problems.mixture_log_joint(draws.samples["locs"], data)
        torch.testing.assert_close(draws.log_p.float(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoPlanar])
def test_constrained_sites_and_plates_vectorized_or_not(kind):
    data = torch.linspace(-1.0, 2.0, 5)
    guide = kind(problems.plated)
    guide(data)
    for vectorize in (True, False):
        draws = importance_draws((problems.plated, guide), data, num_samples=40, vectorize=vectorize)
        s = draws.samples
        mean = s["slope"].sum(-1) + s["weights"][:, 0]
        expected = (
            dist.HalfCauchy(1.0).log_prob(s["scale"])
            + dist.Normal(0.0, 1.0).log_prob(s["slope"]).sum(-1)
            + dist.Dirichlet(torch.ones(3)).log_prob(s["weights"])
            + dist.Normal(mean, s["scale"]).log_prob(data.unsqueeze(-1)).sum(0)
        )
        torch.testing.assert_close(draws.log_p.float(), expected, rtol=1e-4, atol=1e-3)


def test_batches_bound_the_memory():
    sizes = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        sizes.append(z.numel())

    d = diagnose((model, normal_guide(0.0, 1.1)), num_samples=1050, batch_size=100)
    assert max(sizes) == 100
    assert d.num_samples == 1050


def test_it_changes_no_parameter_and_keeps_no_graph():
    problem = Regression(0)
    guide = AutoDiagonalNormal(problem.model)
    guide()
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    draws = importance_draws((problem.model, guide), num_samples=100)
    assert not draws.samples["beta"].requires_grad
    assert all(p.grad is None for p in guide.parameters())
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())


# --- weights ---


def arviz_psislw(log_weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    try:
        from arviz import psislw

        smoothed, k = psislw(log_weights.numpy())
    except ImportError:
        from arviz_stats.base import array_stats

        smoothed, k = array_stats.psislw(-log_weights.numpy())
    return torch.as_tensor(smoothed), float(k)


@pytest.mark.parametrize("k", [0.1, 0.4, 0.7, 1.0])
def test_k_hat_is_arvizs_and_that_of_the_weights(k):
    # Weights u^-k are Pareto with tail index 1 / k. A tail of 3 sqrt(n) = 949 draws finds k with a
    # standard error of about (1 + k) / sqrt(949), at most 0.065.
    log_weights = -k * torch.rand(100_000, dtype=torch.float64).log()
    smoothed, k_hat = pareto_smooth(log_weights)
    expected, expected_k = arviz_psislw(log_weights.clone())
    assert k_hat == pytest.approx(expected_k, abs=1e-6)
    assert k_hat == pytest.approx(k, abs=0.2)
    torch.testing.assert_close(smoothed.log_softmax(0), expected, rtol=1e-6, atol=1e-6)
    # Weights below the tail keep their scale.
    low = log_weights.argsort()[:50_000]
    torch.testing.assert_close(smoothed[low], log_weights[low])


def test_k_hat_of_a_diagnosis_is_arvizs():
    problem = Regression(3)
    pair = problem.model, problem.guide(0.8)
    pyro.set_rng_seed(5)
    k_hat = diagnose(pair, num_samples=1000).k_hat
    pyro.set_rng_seed(5)
    draws = GuideDraws(pair, (), {}, vectorize=True)
    log_weights = torch.cat([batch.log_weights for batch in draws.batches(1000, 1000)])
    assert k_hat == pytest.approx(arviz_psislw(log_weights)[1], abs=1e-6)


def test_weights_of_zero_stay_zero():
    log_weights = torch.randn(500, dtype=torch.float64)
    log_weights[::5] = -torch.inf
    smoothed, k_hat = pareto_smooth(log_weights)
    assert (smoothed[::5] == -torch.inf).all()
    assert k_hat == pareto_smooth(log_weights[log_weights > -torch.inf])[1]
    values = torch.ones(500)
    values[::5] = torch.nan
    assert float(weighted_mean(values, smoothed)) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [torch.zeros(10), torch.full((100,), torch.nan)])
def test_pareto_smooth_refuses(bad):
    with pytest.raises(ValueError, match="Expected at least 25 finite log weights"):
        pareto_smooth(bad)


def test_effective_sample_size():
    assert effective_sample_size(torch.zeros(7)) == 7.0
    assert effective_sample_size(torch.tensor([0.0, -torch.inf])) == 1.0
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert effective_sample_size(weights.log() + 500) == pytest.approx(36 / 14)


def test_stratified_resampling_is_within_one_of_the_expected_counts():
    log_weights = torch.randn(20)
    index = resample(log_weights, 1000)
    counts = torch.bincount(index, minlength=20)
    assert ((counts - 1000 * log_weights.softmax(0)).abs() < 2).all()
    assert not torch.equal(index, index.sort().values)


def test_resampling_without_replacement():
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0])
    firsts = [int(resample(weights.log(), 1, replacement=False)) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(firsts), minlength=4) / 4000
    # Standard errors are below 0.008; five of them fail once in two million.
    torch.testing.assert_close(shares, weights / 8, rtol=0, atol=0.04)
    assert resample(weights.log(), 3, replacement=False).sort().values.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="num_samples` <= 3"):
        resample(weights.log(), 4, replacement=False)


def test_weighted_draws_find_the_posterior():
    problem = Regression(1)
    draws = importance_draws((problem.model, problem.guide(1.4, 0.2)), num_samples=20_000)
    sd = problem.covariance.diagonal().sqrt()
    error = (draws.mean("beta") - problem.mean).abs() / (sd / math.sqrt(draws.ess))
    # Three coordinates beyond 4.5 standard errors: once in 50,000 seeds.
    assert (error < 4.5).all()
    resampled = draws.resample(5000)["beta"]
    assert resampled.shape == (5000, 3)
    torch.testing.assert_close(resampled.T.cov(), problem.covariance, rtol=0.15, atol=0.02)
    assert len(draws.resample(100, replacement=False)["beta"].unique(dim=0)) == 100


def test_weighted_mean_refuses_other_lengths():
    with pytest.raises(ValueError, match="as many draws as weights"):
        weighted_mean(torch.zeros(3), torch.zeros(4))


# --- verdicts ---


def fit(model, guide, schedule, num_steps, **kwargs):
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
    svi = AdaAnnSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo, schedule=schedule, **kwargs)
    for _ in range(num_steps):
        svi.step()
    return svi


def check_text(d: Diagnosis) -> str:
    text = str(d)
    assert max(map(len, text.splitlines())) <= 90
    assert "misspecified" not in text
    assert "a mode that none of them visits" in text.replace("\n", " ")
    assert f"{d.k_hat:.2f}" in text
    return text.replace("\n", " ")


def test_a_good_guide():
    problem = Regression(0)
    d = diagnose((problem.model, problem.guide(1.02)))
    assert d.is_good
    assert d.inverse_temperature == 1.0
    assert d.is_done is None
    assert "Verdict: GOOD." in check_text(d)


def test_the_exact_guide_is_good_though_its_weights_have_no_tail():
    problem = Regression(0)
    d = diagnose((problem.model, problem.guide()))
    assert d.is_good
    assert d.gap == pytest.approx(0.0, abs=1e-4)
    assert d.ess == pytest.approx(d.num_samples, rel=1e-4)


NOTHING_LOST = LadderReport(num_rungs=5, lost=[], min_ess=0.3)


def test_a_mode_beside_the_guide_makes_the_tail_heavy_though_weights_are_nearly_equal():
    # A tenth of the posterior is 6 sds away: ten thousand draws come to 4, and see its rim.
    def model() -> None:
        components = dist.Normal(torch.tensor([0.0, 6.0]), torch.ones(2))
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.9, 0.1])), components))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    diagnosis = diagnose((model, guide))
    assert diagnosis.log_evidence == pytest.approx(math.log(0.9), abs=0.01)
    assert diagnosis.verdict.startswith("UNRELIABLE")
    assert "nearly equal" in diagnosis.verdict


def test_a_heavy_tail_that_holds_nothing_is_no_reason_to_throw_a_fit_away():
    # A fifth of a percent of the posterior is three times as wide as the guide: the shape of the tail of
    # the weights is 8/9, their variance infinite, and a thousandth of the mass is at stake.
    def model() -> None:
        components = dist.Normal(torch.zeros(2), torch.tensor([1.0, 3.0]))
        mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.998, 0.002])), components)
        pyro.sample("z", mixture)

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    for _ in range(10):
        diagnosis = diagnose((model, guide))
        assert diagnosis.is_good
        assert abs(diagnosis.log_evidence) < 0.005
    worse = replace(diagnosis, k_hat=0.9, ess=0.9 * diagnosis.num_samples)
    assert worse.verdict.startswith("UNRELIABLE")
    nearly_equal = replace(worse, ess=0.92 * diagnosis.num_samples)
    assert nearly_equal.is_good
    assert "no alarm here" in nearly_equal.verdict
    assert "0.90 (> 0.70, harmless: see below)" in str(nearly_equal)
    # A ladder does not know what lies beyond the base; wider draws that find more, do.
    assert replace(nearly_equal, reach=None, ladder=NOTHING_LOST).verdict.startswith("UNRELIABLE")
    more = replace(diagnosis.reach, log_evidence=diagnosis.log_evidence + 0.11)
    assert replace(nearly_equal, reach=more).verdict.startswith("UNRELIABLE")
    # Of fewer draws ten hold more.
    assert not replace(nearly_equal, num_samples=1000, ess=920.0).is_good


def test_a_fit_that_stopped_half_way_is_never_fine():
    problem = Regression(0)
    guide = problem.guide(1.02)  # good by all its weights
    pyro.param("unused", torch.zeros(()))

    def with_param():
        pyro.param("unused", torch.zeros(()))
        return guide()

    svi = fit(problem.model, with_param, SequenceSchedule([0.5, 1.0]), 2, num_initial_steps=5)
    d = diagnose(svi)
    assert d.inverse_temperature == 0.5
    assert d.k_hat < 0.7
    assert d.gap < 0.05
    assert not d.is_good
    assert "Verdict: NOT ANNEALED. The fit stands at inverse temperature 0.5" in check_text(d)
    assert "GOOD" not in str(d)
    assert "USABLE" not in str(d)


def test_a_tempered_loss_of_plain_svi_counts_too():
    problem = Regression(0)
    guide = AutoDiagonalNormal(problem.model)
    elbo = TemperedTrace_ELBO(inverse_temperature=0.5)
    svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    svi.step()
    assert not diagnose(svi, num_samples=200).is_annealed
    elbo.inverse_temperature = 1.0
    assert diagnose(svi, num_samples=200).is_annealed


def test_a_fit_with_final_steps_left():
    problem = Regression(0)
    svi = fit(problem.model, AutoDiagonalNormal(problem.model), SequenceSchedule([1.0]), 3, num_final_steps=9)
    d = diagnose(svi, num_samples=500)
    assert d.is_done is False
    assert not d.is_good
    assert "has not taken all its final steps" in check_text(d)


def test_a_guide_of_one_mode_of_two():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0).mask(False))
        modes = (dist.Normal(loc, 0.5).log_prob(z) for loc in (-3.0, 3.0))
        pyro.factor("two", torch.logaddexp(*modes) - math.log(2))

    d = diagnose((model, normal_guide(3.0, 0.52)))
    assert d.k_hat < 0.5
    assert d.log_evidence == pytest.approx(-math.log(2), abs=0.02)  # the exact one is 0
    assert d.lost_share is None
    check_text(d)
    # The evidence on the way still held both modes.
    d = replace(d, thermodynamic=ThermodynamicEstimate(0.0, 0.05, 0.01))
    assert d.lost_share == pytest.approx(0.5, abs=0.05)
    assert not d.is_good
    text = check_text(d)
    assert "LOST PART" in text
    assert "of the posterior may be in a part that the guide lost" in text
    # Less evidence than the weights find is no alarm, and has no error to be believed.
    assert "0.000 +- 0.051 (thermodynamic integration, rather too low)" in text
    low = replace(d, thermodynamic=ThermodynamicEstimate(-3.0, 0.05, 0.01))
    assert low.lost_share is None
    assert "-3.000 (thermodynamic integration, too low" in str(low)
    # Nor is a difference within the error.
    assert replace(d, thermodynamic=ThermodynamicEstimate(0.0, 0.5, 0.01)).lost_share is None


def test_a_guide_that_is_too_narrow():
    problem = Regression(0)
    d = diagnose((problem.model, problem.guide(0.4)))
    assert d.k_hat > 0.7
    assert not d.has_reliable_weights
    text = check_text(d)
    assert "Verdict: UNRELIABLE." in text
    assert "too narrow" in text


def test_a_guide_that_is_too_wide_is_usable_with_weights():
    problem = Regression(0)
    d = diagnose((problem.model, problem.guide(1.4)))
    assert d.k_hat < 0.5
    assert not d.is_good
    assert "Verdict: USABLE WITH WEIGHTS." in check_text(d)


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_broken_draws_weigh_nothing_and_are_counted(value):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(z > 0, 0.0, value))

    d = diagnose((model, normal_guide(0.5, 1.2)), num_samples=4000)
    assert d.log_evidence == pytest.approx(math.log(0.5), abs=5 * d.log_evidence_se)
    expected = float(dist.Normal(0.5, 1.2).cdf(torch.tensor(0.0)))
    assert d.broken_share == pytest.approx(expected, abs=0.04)
    assert math.isfinite(d.elbo)
    assert f"no finite log density at {d.broken_share:.0%} of the draws" in check_text(d)
    assert "UNRELIABLE" in d.verdict


def test_parameters_that_torch_refuses_break_their_draw_alone():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, torch.where(z > 3, torch.inf, 1.0)), obs=torch.tensor(0.0))

    d = diagnose((model, normal_guide(0.0, 1.5)), num_samples=4000)
    assert 0 < d.num_broken < 400
    assert d.log_evidence == pytest.approx(-0.5 * math.log(2 * math.pi), abs=0.1)


# --- errors ---


def test_a_subsampled_plate_is_refused_and_the_way_out_works():
    data = torch.linspace(-1.0, 1.0, 6)
    guide = AutoNormal(problems.plated)
    guide(data)
    with pytest.raises(ValueError, match="got 3 of 6 in plate 'rows'"):
        diagnose((problems.plated, guide), data, subsample_size=3)
    assert diagnose((problems.plated, guide), data, num_samples=100, subsample_size=None).num_broken == 0


def test_a_guide_that_misses_a_site_is_refused():
    problem = Regression(0)
    with pytest.raises(ValueError, match="got none for 'beta'"):
        diagnose((problem.model, lambda: None))


@pytest.mark.parametrize("fails_loudly", [True, False])
def test_a_model_that_does_not_vectorize_is_found_out(fails_loudly):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        if fails_loudly:
            pyro.factor("f", -z @ torch.eye(2) @ z)
        else:
            pyro.factor("f", -(z**2).sum())

    def guide():
        pyro.sample("z", dist.Normal(0.0, 0.6).expand([2]).to_event(1))

    with pytest.raises(ValueError, match="Pass `vectorize=False`"):
        diagnose((model, guide))
    d = diagnose((model, guide), num_samples=400, vectorize=False)
    # The integral of exp(-3 z^2 / 2) / sqrt(2 pi) is 3^-1/2, for each of two coordinates.
    assert d.log_evidence == pytest.approx(-math.log(3), abs=5 * d.log_evidence_se)


@pytest.mark.parametrize("svi", [None, standard_normal, (standard_normal,)])
def test_the_first_argument_is_a_fit(svi):
    with pytest.raises(ValueError, match=r"AdaAnnSVI, a pyro.infer.SVI or a pair \(model, guide\)"):
        diagnose(svi)


@pytest.mark.parametrize(("name", "value"), [("num_samples", 10), ("batch_size", 0)])
def test_counts_are_checked(name, value):
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        diagnose((standard_normal, standard_normal), **{name: value})


# --- thermodynamic integration ---


@pytest.mark.parametrize("path", ["joint", "likelihood", "bridge"])
def test_thermodynamic_integration_of_normal_densities(path):
    problem, base = problems.conjugate_normal(1), (0.5, 2.0)
    grid = torch.linspace(-12.0, 12.0, 20_001, dtype=torch.float64)
    log_joint = problem.log_prior(grid[:, None]) + problem.log_likelihood(grid[:, None])
    log_base = dist.Normal(*map(torch.tensor, base)).log_prob(grid)
    start = {"joint": 0.0, "likelihood": problem.log_prior(grid[:, None]), "bridge": log_base}[path]
    log_factor = log_joint - start
    nodes = []
    for t in [0.05 * 1.12**i for i in range(27)] + [1.0]:
        log_density = start + t * log_factor
        weights = log_density.softmax(0)
        mean = float(weights @ log_factor)
        sd = math.sqrt(float(weights @ (log_factor - mean) ** 2))
        log_normalizer = float(log_density.logsumexp(0)) + math.log(float(grid[1] - grid[0]))
        nodes.append(TemperatureNode(t, mean, sd, 1e4, log_normalizer, 0.01))
    estimate = integrate(nodes)
    assert estimate.log_evidence == pytest.approx(nodes[-1].log_normalizer, abs=2e-3)
    assert 2e-4 < estimate.error < 0.2


def two_modes() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    modes = torch.logaddexp(*(dist.Normal(loc, 0.4).log_prob(z[..., 0]) for loc in (-3.0, 3.0)))
    pyro.factor("data", modes - 0.5 * z[..., 1] ** 2)


#: Its log evidence, the integral of two normal densities times another.
TWO_MODES_LOG_EVIDENCE = (
    math.log(2)
    + float(dist.Normal(0.0, math.sqrt(25.16)).log_prob(torch.tensor(3.0)))
    + float(dist.Normal(0.0, math.sqrt(26.0)).log_prob(torch.tensor(0.0)))
    + 0.5 * math.log(2 * math.pi)
)


@pytest.mark.parametrize("path", ["joint", "likelihood", "bridge"])
def test_thermodynamic_integration_alarms_where_a_mode_is_gone_alone(path):
    """Of a fit whose draws hold both modes, reliable weights and the integral know the same evidence."""
    for seed in (1, 2):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = AutoPlanar(two_modes, num_transforms=16, base_scale=4.0)
        elbo = Trace_ELBO(num_particles=50, vectorize_particles=True)
        svi = AdaAnnSVI(
            two_modes,
            guide,
            pyro.optim.Adam({"lr": 0.01}),
            elbo,
            path=path,
            schedule=AdaAnnSchedule(0.3),
            num_initial_steps=150,
            num_final_steps=200,
        )
        svi.run(progress_bar=False)
        d = diagnose(svi)
        share = float((guide.sample_posterior(5000)["z"][:, 0] > 0).float().mean())
        has_both = min(share, 1 - share) > 0.05
        assert d.thermodynamic is not None
        # The guide is behind the tempered densities and never before them: the integral is not too large.
        second_error = d.thermodynamic.log_evidence - TWO_MODES_LOG_EVIDENCE
        assert second_error < 0.2
        if has_both and d.has_reliable_weights:
            assert d.lost_share is None
        if d.lost_share is not None and d.has_reliable_weights:
            assert d.log_evidence - TWO_MODES_LOG_EVIDENCE == pytest.approx(-math.log(2), abs=0.2)
            assert d.verdict.startswith("LOST PART")


def test_importance_draws_of_a_fit_below_one_say_so():
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True)
    svi = AdaAnnSVI(two_modes, AutoPlanar(two_modes, 3), pyro.optim.Adam({"lr": 0.01}), elbo)
    svi.step()
    with pytest.warns(UserWarning, match=r"inverse temperature 0\.01.*only their weights.*svi\.run"):
        importance_draws(svi, num_samples=500)
