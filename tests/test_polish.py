"""Chains that polish a fit: right for any guide, with R-hat and acceptance that say how right it was."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal, plated
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy.stats import kstest, norm, rankdata

from pyro_adaann import AutoPlanar, AutoRealNVP, GuideKernel, polish
from pyro_adaann.sampling import moves
from pyro_adaann.sampling.chains import GuidedChains
from pyro_adaann.sampling.convergence import rank_normalized_r_hat
from pyro_adaann.sampling.flow import with_wide_tails
from pyro_adaann.sampling.moves import HMC

PROBLEM = conjugate_normal(2)


def wrong_guide() -> AutoPlanar:
    """A guide that is off by half a sd and too wide."""
    mean, sd = PROBLEM.tempered("joint", 1.0, (0.0, 1.0))
    guide = AutoPlanar(
        PROBLEM.model, 2, affine=None, base_loc=mean + 0.5 * sd, base_scale=1.5 * sd
    ).initialize()
    with torch.no_grad():
        guide.transform.u.copy_(torch.tensor([[0.3, 0.1], [0.1, 0.2]]))
    return guide


def test_chains_from_a_wrong_guide_have_the_posterior():
    """Thinned draws by Kolmogorov-Smirnov; false failures 2 * 1e-4, somewhat more for what is left of
    the chains' memory."""
    chains = polish(
        (PROBLEM.model, wrong_guide()),
        num_chains=64,
        num_samples=60,
        num_warmup=30,
        seed=0,
        progress_bar=False,
    )
    mean, sd = PROBLEM.tempered("joint", 1.0, (0.0, 1.0))
    u = (chains.samples["z"][:, ::4] - mean) / sd
    for number in u.reshape(-1, 2).unbind(-1):
        assert kstest(number.numpy(), "norm").pvalue > 1e-4
    assert chains.max_r_hat < 1.04  # of independent draws 1.00; of halves of 30 with a memory of two 1.02
    assert chains.min_ess > 500
    assert 0.5 < float(chains.acceptance.mean()) < 0.97
    assert 0.2 < float(chains.guide_acceptance.mean()) < 0.95
    assert "R-hat at most 1.0" in repr(chains)


@pytest.mark.parametrize("make", [AutoMultivariateNormal, lambda model: AutoRealNVP(model, 2, [8])])
def test_other_guides_with_a_transform_can_be_polished(make):
    data = torch.linspace(-1.0, 1.0, 4)
    guide = make(plated)
    guide(data)
    chains = polish((plated, guide), data, num_samples=20, num_warmup=10, seed=0, progress_bar=False)
    assert chains.samples["weights"].shape == (4, 20, 3)
    assert (chains.samples["scale"] > 0).all()
    assert torch.isfinite(chains.log_p).all()


def test_many_proposals_are_those_one_after_the_other():
    """With the same draws, a batch of three proposals is three steps of one; and some are accepted."""
    target = GuidedChains((PROBLEM.model, wrong_guide()), (), {}, kernel=HMC(), vectorize=True, seed=0).target
    torch.manual_seed(0)
    points = target.evaluate(torch.randn(50, 2))
    x, u = torch.randn(3, 50, 2), torch.rand(3, 50)
    draws, uniforms = iter([x.reshape(150, 2), *x]), iter([*u, *u])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moves, "draw_base", lambda *_: next(draws))
        patch.setattr(moves, "uniform", lambda *_: next(uniforms))
        together, probability = moves.independence_move(target, 1.0, points, torch.Generator(), 3)
        one, probabilities = points, []
        for _ in range(3):
            one, each = moves.independence_move(target, 1.0, one, torch.Generator())
            probabilities.append(each)
    assert torch.equal(together.x, one.x)
    assert torch.equal(together.terms, one.terms)
    torch.testing.assert_close(probability, torch.stack(probabilities).mean(0))
    assert 10 < int((one.x != points.x).any(-1).sum()) < 50


@pytest.mark.parametrize("dim", [1, 3, 20])
def test_proposals_have_wide_tails_in_about_one_coordinate(dim):
    """Variance of a coordinate 1 + 3 share, within five standard errors of 100,000 draws: 1e-6 for each."""
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    wide = with_wide_tails(base)
    x = wide.sample((100_000,))
    share = min(1 / dim, 0.25)
    excess = x.square().mean(0) - (1 + 3 * share)
    assert (excess.abs() < 5 * math.sqrt((48 * share + 3) / 100_000)).all()
    # The density is that of the draws: the mean of its reciprocal times another density is 1.
    ratio = (base.log_prob(x) - wide.log_prob(x)).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(100_000)
    # Where the guide is right most proposals are accepted: their weights have a bound.
    assert float(ratio.max()) < 1.7
    student = dist.StudentT(3.0, torch.zeros(dim), 1.0).to_event(1)
    assert with_wide_tails(student) is student


@pytest.mark.parametrize("shape", [(4, 50), (3, 101, 2), (2, 40, 2, 2)])
def test_r_hat_is_that_of_its_definition(shape):
    """By SciPy's ranks and NumPy's variances; heavy tails and equal draws count by their ranks."""
    torch.manual_seed(0)
    draws = dist.Cauchy(0.0, 1.0).sample(shape).round(decimals=1)
    draws[0] += 0.5
    x = draws.double().numpy()[:, : shape[1] - shape[1] % 2]

    def split_r_hat(values):
        scores = norm.ppf((rankdata(values).reshape(values.shape) - 0.375) / (values.size + 0.25))
        halves = np.concatenate(np.split(scores, 2, axis=1))
        num = halves.shape[1]
        within = halves.var(axis=1, ddof=1).mean()
        between = num * halves.mean(axis=1).var(ddof=1)
        return np.sqrt(((num - 1) / num * within + between / num) / within)

    got = rank_normalized_r_hat(draws).reshape(-1)
    for index, column in enumerate(np.moveaxis(x.reshape(*x.shape[:2], -1), -1, 0)):
        middle = np.sort(column, axis=None)[(column.size - 1) // 2]
        expected = max(split_r_hat(column), split_r_hat(np.abs(column - middle)))
        assert float(got[index]) == pytest.approx(expected, rel=1e-6)


def test_modes_exchange_mass_by_the_guide():
    """Shares .7 and .3 by a guide with shares near a half; 6,000 draws, false failures below 1e-4."""
    half = 3.0

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1).mask(False))
        left, right = (dist.Normal(loc, 1.0).log_prob(z).sum(-1) for loc in (-half, half))
        pyro.factor("density", torch.logaddexp(left + math.log(0.7), right + math.log(0.3)))

    guide = AutoPlanar(model, 2, affine=None, base_loc=0.0, base_scale=1.0).initialize()
    with torch.no_grad():
        guide.transform.w.copy_(torch.tensor([[8.0], [0.0]]))
        guide.transform.u.copy_(torch.tensor([[2.5], [0.0]]))
        guide.transform.b.zero_()
    chains = polish(
        (model, guide),
        num_chains=200,
        num_walkers=200,
        num_samples=30,
        num_warmup=20,
        seed=1,
        progress_bar=False,
    )
    assert abs(float((chains.samples["z"] < 0).float().mean()) - 0.7) < 0.06
    assert float(chains.guide_acceptance.mean()) > 0.2
    crossings = (chains.samples["z"].sign().diff(dim=1) != 0).float().mean()
    assert crossings > 0.05


def test_a_seed_gives_the_same_chains_and_leaves_the_generator_alone():
    guide = wrong_guide()
    before = torch.get_rng_state()
    runs = [
        polish((PROBLEM.model, guide), num_samples=20, num_warmup=10, seed=3, progress_bar=False)
        for _ in range(2)
    ]
    assert torch.equal(runs[0].samples["z"], runs[1].samples["z"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fitted_svi_is_polished():
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(PROBLEM.model)
    svi = SVI(
        PROBLEM.model,
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        Trace_ELBO(num_particles=10, vectorize_particles=True),
    )
    for _ in range(200):
        svi.step()
    chains = polish(svi, num_samples=50, num_warmup=20, seed=0, progress_bar=False)
    assert float(chains.guide_acceptance.mean()) > 0.7  # the posterior is normal


def test_chains_go_to_arviz():
    chains = polish((PROBLEM.model, wrong_guide()), num_samples=50, num_warmup=10, seed=0, progress_bar=False)
    data = chains.to_arviz()
    assert data["posterior"].sizes["chain"] == 4
    assert data["sample_stats"]["guide_acceptance_rate"].shape == (4, 50)


def test_the_kernel_of_mcmc_has_the_same_posterior():
    """150 draws of one chain, effectively about 75, bounds of four standard errors: false failures 3e-4."""
    mcmc = MCMC(
        GuideKernel((PROBLEM.model, wrong_guide()), num_tuning_steps=50),
        150,
        warmup_steps=10,
        disable_progbar=True,
    )
    mcmc.run()
    mean, sd = PROBLEM.tempered("joint", 1.0, (0.0, 1.0))
    z = mcmc.get_samples()["z"]
    assert ((z.mean(0) - mean).abs() < 0.46 * sd).all()
    assert ((z.std(0) / sd - 1).abs() < 0.33).all()
    assert mcmc.diagnostics()["guide acceptance rate"]["chain 0"] > 0.1


def test_the_kernel_of_mcmc_constrains():
    data = torch.linspace(-1.0, 1.0, 4)
    guide = AutoPlanar(plated, 2).initialize(data)
    mcmc = MCMC(GuideKernel((plated, guide), num_tuning_steps=5), 10, warmup_steps=2, disable_progbar=True)
    mcmc.run(data)
    samples = mcmc.get_samples()
    assert samples["weights"].shape == (10, 3)
    assert (samples["scale"] > 0).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a guide with a base and a transform"):
        polish((PROBLEM.model, AutoNormal(PROBLEM.model)), progress_bar=False)
    with pytest.raises(ValueError, match="num_walkers"):
        polish((PROBLEM.model, wrong_guide()), num_walkers=2)

    def other(data):
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="latent sites of the model"):
        polish((other, AutoPlanar(plated, 2).initialize(torch.zeros(3))), torch.zeros(3))
    with pytest.raises(ValueError, match="initial_params"):
        GuideKernel((PROBLEM.model, wrong_guide())).initial_params = {"z": torch.zeros(2)}
