"""Nested Laplace approximations: as densities, against exact posteriors, and beside the flows of `fit`."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_adaann.nested.search as search_module
from pyro_adaann import FitResult, fit
from pyro_adaann.diagnostics.rules import Level
from pyro_adaann.nested.density import Density
from pyro_adaann.nested.guide import NestedGuide
from pyro_adaann.nested.laplace import NestedLaplace
from pyro_adaann.nested.lattice import spread
from pyro_adaann.nested.mixture import LaplaceMixture
from pyro_adaann.nested.modes import find_modes
from pyro_adaann.nested.outer import find_outer, most_skewed
from pyro_adaann.nested.refine import refined
from pyro_adaann.nested.search import find_nested_laplace
from pyro_adaann.weights import effective_sample_size, log_mean_weight

#: Eight schools: effects and their errors.
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def funnel(num_leaves=5, sd=2.0):
    """Neal's funnel as one site, so that nothing is known of its structure."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(num_leaves + 1), 3.0).to_event(1))
        neck, leaves = z[..., 0], z[..., 1:]
        log_p = dist.Normal(0.0, sd).log_prob(neck)
        log_p = log_p + dist.Normal(0.0, (neck / 2).exp().unsqueeze(-1)).log_prob(leaves).sum(-1)
        prior = dist.Normal(torch.zeros(num_leaves + 1), 3.0).to_event(1).log_prob(z)
        pyro.factor("rest", log_p - prior)

    return model


def funnel_draws(num, num_leaves=5, sd=2.0, seed=0, least=-math.inf):
    """Return exact draws of the funnel, those of a neck below a value left out."""
    generator = torch.Generator().manual_seed(seed)
    neck = sd * torch.randn(num, 1, generator=generator, dtype=torch.double)
    leaves = (neck / 2).exp() * torch.randn(num, num_leaves, generator=generator, dtype=torch.double)
    draws = torch.cat([neck, leaves], 1)
    return draws[draws[:, 0] > least]


def lattice(num_outer=1, num_inner=2, seed=0):
    """Return an approximation whose nodes differ in location, factor and mass."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(-4, 5)
    nodes = torch.cartesian_prod(*[axis] * num_outer).reshape(-1, num_outer)
    nodes = nodes[nodes.abs().sum(1) <= 5]  # no box
    num = len(nodes)
    loc = torch.randn(num, num_inner, generator=generator, dtype=torch.double)
    factor = torch.randn(num, num_inner, num_inner, generator=generator, dtype=torch.double).tril()
    factor.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
    log_mass = torch.randn(num, generator=generator, dtype=torch.double)
    outer = torch.arange(num_outer) * 2  # not next to each other
    return NestedLaplace(
        outer,
        torch.full((num_outer,), 0.3).double(),
        torch.full((num_outer,), 0.7).double(),
        nodes,
        loc,
        factor,
        log_mass,
    )


# The density.


@pytest.mark.parametrize(("num_outer", "num_inner"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_the_density_has_an_integral_of_one(num_outer, num_inner):
    # E_q[g / q] is the integral of g, 1 for a density within the lattice. Error .3 %; four of them fail by
    # chance once in 10,000 runs at four standard errors.
    nested = lattice(num_outer, num_inner)
    torch.manual_seed(0)
    z = nested.sample((200_000,))
    dim = num_outer + num_inner
    inside = dist.Normal(0.3, 0.4).expand([dim]).to_event(1)
    ratio = (inside.log_prob(z) - nested.log_prob(z)).exp()
    error = float(ratio.std()) / len(z) ** 0.5
    assert error < 0.1
    assert abs(float(ratio.mean()) - 1) < 4 * error


def test_draws_have_the_moments_of_the_density():
    nested = lattice(1, 1)
    torch.manual_seed(1)
    z = nested.sample((200_000,))
    axis = torch.linspace(-5, 5, 801, dtype=torch.double)
    grid = torch.cartesian_prod(axis, torch.linspace(-12, 12, 801, dtype=torch.double))
    weights = nested.log_prob(grid).exp()
    total = weights.sum() * (axis[1] - axis[0]) * 24 / 800
    assert abs(float(total) - 1) < 1e-3
    weights = weights / weights.sum()
    mean = weights @ grid
    sd = (weights @ (grid - mean).square()).sqrt()
    # Standard errors .0022 sds; a false failure once in 10,000 runs for each of four numbers.
    assert ((z.mean(0) - mean).abs() / sd).max() < 4 * 0.0023
    assert (z.std(0) / sd - 1).abs().max() < 4 * 0.003


def test_there_is_no_density_beyond_the_lattice():
    nested = lattice(2, 2)
    far = torch.zeros(3, 4)
    far[0, 0], far[1, 2], far[2, 0] = 100.0, -1e30, torch.inf
    assert (nested.log_prob(far) == -torch.inf).all()


def test_it_is_a_distribution_with_batches():
    nested = lattice(1, 2).expand((3, 4))
    assert nested.sample().shape == (3, 4, 3)
    assert nested.log_prob(torch.zeros(3, 4, 3)).shape == (3, 4)
    with pyro.plate("plate", 7):
        assert pyro.sample("z", lattice(1, 2)).shape == (7, 3)


# Modes and lattice.


def linear_model(num=4, seed=0):
    """Return a model of a normal posterior, with its covariance."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(num, num, generator=generator, dtype=torch.double).tril() * 0.3
    factor.diagonal().abs_().add_(0.5)
    loc = torch.randn(num, generator=generator, dtype=torch.double)

    def model():
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))

    return model, loc, factor @ factor.T


def test_modes_of_a_normal_density_are_exact():
    model, loc, covariance = linear_model()
    points = torch.zeros(3, 4, dtype=torch.double)
    points[:, 1] = torch.tensor([-1.0, 0.0, 2.0])
    inner = torch.tensor([0, 2, 3])
    found = find_modes(Density(model, (), {}), inner, points, torch.full((3, 3), 7.0).double())
    gain = covariance[inner, 1] / covariance[1, 1]
    expected = loc[inner] + (points[:, 1:2] - loc[1]) * gain
    conditional = covariance[inner][:, inner] - torch.outer(gain, covariance[1, inner])
    assert torch.allclose(found.points[:, inner], expected, atol=1e-6)
    assert torch.allclose(found.covariance, conditional.expand(3, 3, 3), atol=1e-6)
    marginal = dist.Normal(loc[1], covariance[1, 1].sqrt()).log_prob(points[:, 1])
    assert torch.allclose(found.log_mass, marginal, atol=1e-6)


def test_a_saddle_is_no_mode():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.factor("rest", z[..., 1] ** 2)  # rises to both sides

    found = find_modes(
        Density(model, (), {}), torch.tensor([1]), torch.zeros(1, 2).double(), torch.ones(1, 1).double()
    )
    assert found.log_mass[0] == -torch.inf


def test_a_neck_is_followed_to_its_end_from_draws_that_lack_it():
    draws = funnel_draws(5000, least=-2.0)
    density = Density(funnel(), (), {})
    nested = spread(density, [0], draws, torch.zeros(len(draws)))
    torch.manual_seed(0)
    z = nested.sample((5000,))
    assert z[:, 0].min() < -6
    log_weights = density.log_p(z) - nested.log_prob(z)
    assert effective_sample_size(log_weights) > 0.95 * 5000
    assert abs(log_mean_weight(log_weights)) < 0.02  # error .003: the draws lack a sixth


def test_a_lattice_that_is_cut_off_is_none(monkeypatch):
    draws = funnel_draws(3000)
    monkeypatch.setattr("pyro_adaann.nested.lattice._MAX_NODES", 12)
    assert spread(Density(funnel(), (), {}), [0], draws, torch.zeros(3000)) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_coordinate_that_sets_widths_is_found(seed):
    draws = funnel_draws(3000, seed=seed)
    assert find_outer(draws, torch.zeros(len(draws)))[0].coordinate == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_coordinate_of_a_normal_density_sets_widths(seed):
    # Four standard errors for each of 30 pairs: a false failure once in a hundred runs of five seeds.
    _, _, covariance = linear_model(6, seed)
    torch.manual_seed(seed)
    draws = dist.MultivariateNormal(torch.zeros(6).double(), covariance).sample((3000,))
    assert find_outer(draws, torch.zeros(3000)) == []
    draws[:, 3] = draws[:, 3].exp()
    assert most_skewed(draws, torch.zeros(3000)) == 3


def test_a_skewed_density_is_met_by_its_moments_better_than_at_its_mode():
    def model():
        pyro.sample("z", dist.Gamma(torch.full((12,), 2.0), 1.0).to_event(1))

    density = Density(model, (), {})
    draws = dist.Gamma(2.0, 1.0).sample((4000, 12)).log().double()
    nested = spread(density, [0], draws, torch.zeros(4000))
    shares = []
    for _ in range(3):
        z = nested.sample((4000,))
        log_weights = density.log_p(z) - nested.log_prob(z)
        shares.append(effective_sample_size(log_weights) / 4000)
        assert abs(log_mean_weight(log_weights)) < 0.25  # a density
        nested = refined(nested, z, log_weights)
    assert shares[2] > 1.5 * shares[0]


def test_what_an_approximation_lacks_of_another_mode_is_known():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 4.0).to_event(1))
        ahead = dist.Normal(3.0, 0.5).log_prob(z).sum(-1)
        behind = dist.Normal(-3.0, 0.5).log_prob(z).sum(-1)
        prior = dist.Normal(0.0, 4.0).log_prob(z).sum(-1)
        pyro.factor("rest", torch.logaddexp(ahead + math.log(0.7), behind + math.log(0.3)) - prior)

    torch.manual_seed(0)
    sign = torch.where(torch.rand(4000, 1) < 0.7, 1.0, -1.0).double()
    draws = 3 * sign + 0.5 * torch.randn(4000, 3).double()
    found = find_nested_laplace(model, (), {}, draws[sign[:, 0] > 0], torch.zeros(int((sign > 0).sum())))
    assert found.share > 0.9
    assert found.missed < 0.02
    nested = found.density
    z = nested.sample((2000,))
    log_weights = Density(model, (), {}).log_p(z) - nested.log_prob(z)
    assert abs(log_mean_weight(log_weights) - math.log(0.7)) < 0.05


# Beside the flows of `fit`.


def check_funnel(result, num_leaves, sd):
    neck = result.draws.samples["z"][:, 0].double()
    weights = result.draws.log_weights.double().softmax(0)
    mean = float(weights @ neck)
    found_sd = float((weights @ (neck - mean).square()).sqrt())
    assert abs(mean) < 0.05 * sd
    assert abs(found_sd / sd - 1) < 0.04
    assert abs(result.log_evidence) < 0.01
    assert result.level <= Level.USABLE_WITH_WEIGHTS


def test_a_fit_has_the_end_of_a_neck():
    # Errors of some .007 sds, .5 % and .002.
    result = fit(funnel(4, 2.5), seed=0, progress_bar=False)
    check_funnel(result, 4, 2.5)
    assert isinstance(result.guides[-1], NestedGuide)
    assert "nested Laplace" in result.verdict


def effects(y):
    """Eighteen latents: a mean, the log of a scale, and sixteen effects."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("groups", 16):
        effect = pyro.sample("effect", dist.Normal(mean, scale))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def exact_effects(y):
    """Return log evidence, mean and sd of the mean and of the scale, by quadrature."""
    scale = torch.linspace(1e-4, 8, 4001).double()
    y = y.double()
    total = 1 + scale.square()
    precision = 1 / 9 + 16 / total
    loc = y.sum() / total / precision
    log_p = (
        dist.HalfNormal(2.0).log_prob(scale)
        - 8 * (2 * math.pi * total).log()
        - y.square().sum() / (2 * total)
    )
    log_p = log_p - math.log(3) - 0.5 * precision.log() + 0.5 * loc.square() * precision
    evidence = float(log_p.logsumexp(0) + (scale[1] - scale[0]).log())
    weights = log_p.softmax(0)
    means = float(weights @ loc), float(weights @ scale)
    second = weights @ (1 / precision + loc.square()), weights @ scale.square()
    return evidence, means, [math.sqrt(float(s) - m**2) for s, m in zip(second, means, strict=True)]


@pytest.fixture(scope="module")
def without_flow():
    y = 1 + 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(3))
    return fit(effects, y, seed=0, progress_bar=False), y


def test_a_nearly_normal_posterior_needs_no_flow(without_flow):
    result, y = without_flow
    evidence, means, sds = exact_effects(y)
    # Ten thousand draws: errors of .01 sds, .7 %, .005.
    assert abs(result.log_evidence - evidence) < 0.02
    for name, mean, sd in zip(("mean", "scale"), means, sds, strict=True):
        assert abs(float(result.mean(name)) - mean) < 0.05 * sd
        assert abs(float(result.sd(name)) / sd - 1) < 0.04
    assert result.svi is None
    assert [type(guide) for guide in result.guides] == [NestedGuide]
    assert result.fits[0].num_steps == 0
    assert result.level <= Level.USABLE_WITH_WEIGHTS
    assert "without a flow" in str(result.fits[0])


def test_a_result_without_flow_does_all_that_results_do(without_flow, tmp_path):
    result, y = without_flow
    assert "posterior is nearly normal" in str(result)
    assert "posterior is nearly normal" in result._repr_html_()
    some = {name: value[:5] for name, value in result.draws.samples.items()}
    assert torch.allclose(result.log_prob(some).double(), result.draws.log_q[:5].double(), atol=2e-3)
    assert result.predictive(num_samples=7)["y"].shape == (7, 16)
    for by_fit in (False, True):
        data = result.to_arviz(by_fit=by_fit, num_samples=100)
        assert data["posterior"]["effect"].shape == (1, 100, 16)
    result.save(tmp_path / "r.pt")
    loaded = FitResult.load(tmp_path / "r.pt", effects, y)
    assert loaded.verdict == result.verdict
    assert torch.equal(loaded.log_prob(some), result.log_prob(some))
    assert loaded.to_arviz(num_samples=50)["posterior"]["mean"].shape == (1, 50)


def test_the_same_seed_gives_the_same_result_without_flow(without_flow):
    result, y = without_flow
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = fit(effects, y, seed=0, progress_bar=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.log_evidence == result.log_evidence
    assert torch.equal(again.draws.samples["effect"], result.draws.samples["effect"])


def test_flows_are_fitted_where_they_are_asked_for(without_flow):
    _, y = without_flow
    result = fit(effects, y, seed=0, num_fits=1, budget=3.0, progress_bar=False)
    assert result.svi is not None


def signs(num_signs, dim=16, apart=1.0, sd=0.5):
    """Return a model of 2^num_signs modes at both sides of zero; each sign is plus with probability .7."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 2.0).to_event(1))
        ahead, behind = (
            dist.Normal(loc, sd).log_prob(z[..., :num_signs]) + math.log(share)
            for loc, share in ((apart, 0.7), (-apart, 0.3))
        )
        rest = dist.Normal(0.5 * z[..., :1], sd).log_prob(z[..., num_signs:]).sum(-1)
        prior = dist.Normal(0.0, 2.0).log_prob(z).sum(-1)
        pyro.factor("rest", torch.logaddexp(ahead, behind).sum(-1) + rest - prior)

    return model


def draws_of_signs(num_signs, num, dim=16, apart=1.0, sd=0.5):
    """Return exact draws."""
    torch.manual_seed(0)
    sign = torch.where(torch.rand(num, num_signs) < 0.7, 1.0, -1.0).double()
    first = apart * sign + sd * torch.randn(num, num_signs).double()
    return torch.cat([first, 0.5 * first[:, :1] + sd * torch.randn(num, dim - num_signs).double()], 1)


def test_a_mixture_has_the_moments_of_its_parts_and_an_integral_of_one():
    parts = [lattice(1, 1, seed=seed) for seed in (0, 1)]
    mixture = LaplaceMixture(parts, torch.tensor([0.7, 0.3]).log() + 5)
    torch.manual_seed(0)
    z = mixture.sample((40_000,))
    exact = sum(
        share * part.sample((100_000,)).mean(0) for share, part in zip((0.7, 0.3), parts, strict=True)
    )
    assert ((z.mean(0) - exact).abs() < 0.02 * z.std(0)).all()  # 4 standard errors
    # Any part of the draws is one of the mixture's: correlation of neighbors, 1 / sqrt(40,000).
    first = (z[:, 0] - z[:, 0].mean()) / z[:, 0].std()
    assert abs(float((first[1:] * first[:-1]).mean())) < 0.025
    grid = torch.linspace(-12, 12, 1201, dtype=torch.double)
    density = mixture.log_prob(torch.cartesian_prod(grid, grid)).exp()
    assert abs(float(density.sum() * (grid[1] - grid[0]) ** 2) - 1) < 0.01
    assert mixture.expand((3,)).sample((2,)).shape == (2, 3, 2)
    assert mixture.log_prob(mixture.sample((2, 3))).shape == (2, 3)


@pytest.mark.parametrize(("num_signs", "apart", "sd"), [(1, 1.0, 0.25), (1, 3.0, 0.05), (3, 1.5, 0.3)])
def test_every_mode_of_the_draws_is_in_the_approximation(num_signs, apart, sd):
    model = signs(num_signs, 16, apart, sd)
    draws = draws_of_signs(num_signs, 1000, 16, apart, sd)
    draws[::100] = torch.nan  # without weight
    # Weights that have the shares wrong: what the draws know is where the modes are.
    log_weights = torch.where(draws[:, 0].isnan(), -torch.inf, -0.5 * draws[:, 0].sign())
    found = find_nested_laplace(model, (), {}, draws, log_weights)
    assert 1 < len(found.density.parts) <= 2**num_signs  # one may hold two that touch
    assert found.missed == 0.0
    assert found.share > 0.9
    z = found.density.sample((10_000,))
    log_weights = Density(model, (), {}).log_p(z) - found.density.log_prob(z)
    plus = log_weights.softmax(0) @ (z[:, :num_signs] > 0).double()
    assert abs(log_mean_weight(log_weights)) < 0.02
    assert ((plus - 0.7).abs() < 0.025).all()  # 5 standard errors


def test_a_mode_of_few_draws_has_its_own_share():
    # One draw of a hundred knows of a mode with nine tenths of the posterior.
    draws = draws_of_signs(1, 1000, 16, 2.0, 0.3)
    rare = draws[draws[:, 0] > 0][:10]
    draws = torch.cat([draws[draws[:, 0] < 0][:300].repeat(3, 1), rare])
    found = find_nested_laplace(signs(1, 16, 2.0, 0.3), (), {}, draws, torch.zeros(len(draws)))
    assert len(found.density.parts) == 2
    assert abs(float(found.density.log_shares.exp().max()) - 0.7) < 0.02
    assert found.missed == 0.0


@pytest.mark.parametrize("offset", [0.0, -1e9])
def test_shares_have_all_digits_of_evidence(offset):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(4).double(), 2.0).to_event(1))
        ahead, behind = (dist.Normal(loc, 0.3).log_prob(z).sum(-1) for loc in (2.0, -2.0))
        prior = dist.Normal(0.0, 2.0).log_prob(z).sum(-1)
        rest = torch.logaddexp(ahead + math.log(0.7), behind + math.log(0.3)) - prior
        pyro.factor("rest", rest + torch.tensor(offset).double())

    draws = draws_of_signs(1, 1000, 4, 2.0, 0.3)
    draws[:, 1:] += 1.5 * draws[:, :1].sign()
    found = find_nested_laplace(model, (), {}, draws.double(), torch.zeros(1000))
    assert abs(float(found.density.log_shares.exp().max()) - 0.7) < 0.02
    assert found.missed == 0.0
    assert found.density.log_shares.dtype == torch.double


def test_a_guide_that_was_cast_still_has_all_digits():
    mixture = LaplaceMixture([lattice(1, 1)], torch.zeros(1))
    guide = NestedGuide(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)), mixture)
    guide.initialize()
    values = {"z": mixture.sample((5,)).float()}
    before = guide.log_prob(values)
    assert torch.allclose(guide.float().log_prob(values), before, atol=1e-4)


def test_more_modes_than_there_may_be_are_given_up_at_once(monkeypatch):
    monkeypatch.setattr(search_module, "find_modes", None)  # not called
    found = find_nested_laplace(
        signs(12, sd=0.2), (), {}, draws_of_signs(12, 2000, sd=0.2), torch.zeros(2000)
    )
    assert found is None or found.missed > 0.9


def test_a_mode_that_is_left_out_is_no_small_part(monkeypatch):
    # The search stops at one mode: its share counts, and what it misses tells.
    from pyro_adaann.fitting.coordinates import Coordinates
    from pyro_adaann.fitting.necks import search

    monkeypatch.setattr(search_module, "_MOST_MODES", 1)
    nested = search(
        Coordinates(signs(1, apart=3.0), (), {}), draws_of_signs(1, 2000, apart=3.0), torch.zeros(2000)
    )
    assert nested is None or (nested.missed > 0.2 and not nested.is_witness)


def test_a_fit_of_modes_that_are_nearly_normal_needs_no_flow(tmp_path):
    model = signs(2, apart=2.0)
    result = fit(model, seed=0, progress_bar=False)
    assert result.svi is None
    assert result.guides[0].num_modes == 4
    assert "In each of its modes" in result.verdict
    assert abs(result.log_evidence) < 0.02
    z, weights = result.draws.samples["z"], result.draws.log_weights.double().softmax(0)
    plus = weights @ (z[:, :2] > 0).double()
    assert ((plus - 0.7).abs() < 0.025).all()  # 5 standard errors
    result.save(tmp_path / "r.pt")
    for dim in (14, 18):
        with pytest.raises(ValueError, match=f"with 16 free numbers where this has {dim}"):
            FitResult.load(tmp_path / "r.pt", signs(2, dim=dim))
    loaded = FitResult.load(tmp_path / "r.pt", model)
    some = {"z": z[:5]}
    assert torch.equal(loaded.log_prob(some), result.log_prob(some))


def test_a_search_ends_with_the_time_and_with_ctrl_c():
    draws = funnel_draws(3000)
    looks = []

    def goes_on():
        looks.append(None)
        return len(looks) < 5

    assert find_nested_laplace(funnel(), (), {}, draws, torch.zeros(3000), goes_on) is None
    assert 5 <= len(looks) < 20
    assert find_nested_laplace(funnel(), (), {}, draws, torch.zeros(3000)).share > 0.9


def test_a_model_without_gradient_has_no_approximation():
    from pyro_adaann.fitting.coordinates import Coordinates
    from pyro_adaann.fitting.necks import search

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("rest", -z.detach().square().sum(-1))

    def broken():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor(
            "rest", torch.as_tensor(z.detach().numpy().sum(-1)) if z.requires_grad else z.sum(-1) * torch.nan
        )

    draws = torch.randn(2000, 3)
    assert search(Coordinates(broken, (), {}), draws, torch.zeros(2000)) is None
    found = search(Coordinates(model, (), {}), draws, torch.zeros(2000))
    assert (
        found is None or found.share <= 1.0
    )  # gradients that are wrong make a bad proposal, no wrong density


def test_a_log_density_of_nothing_but_rounding_is_no_number():
    from pyro import poutine

    from pyro_adaann.objectives.traces import log_density

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0), obs=x)
        pyro.factor("rest", z.square() / 2 - z.abs())

    for dtype, is_number in ((torch.float32, False), (torch.float64, True)):
        trace = poutine.trace(model).get_trace(torch.tensor(3e7, dtype=dtype))
        trace.compute_log_prob()
        assert bool(log_density(trace).isfinite()) == is_number
    trace = poutine.trace(model).get_trace(torch.tensor(30.0))
    trace.compute_log_prob()
    assert float(log_density(trace)) == pytest.approx(-30.0 - 0.919, abs=0.01)


def test_what_other_draws_reach_is_not_out_of_reach():
    from pyro.infer.autoguide import AutoNormal

    from pyro_adaann.diagnostics.reach import measure_reach

    def model():
        pyro.sample("z", dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1))

    torch.manual_seed(0)
    pyro.clear_param_store()
    guide = AutoNormal(model, init_scale=0.5)
    short = measure_reach(model, guide, (), {}, 2000, 1000, True)
    assert short.is_short
    wide = dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1)
    also = measure_reach(model, guide, (), {}, 2000, 1000, True, lambda values: wide.log_prob(values["z"]))
    assert also.share == 0.0
    narrow = dist.Normal(torch.zeros(2), 0.2).to_event(1)
    neither = measure_reach(
        model, guide, (), {}, 2000, 1000, True, lambda values: narrow.log_prob(values["z"])
    )
    assert neither.is_short


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_eight_schools_as_one_site_are_exact(seed):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 5.0).to_event(1))
        log_tau, mu, theta = z[..., 0], z[..., 1], z[..., 2:]
        tau = log_tau.exp()
        log_p = dist.HalfCauchy(5.0).log_prob(tau) + log_tau + dist.Normal(0.0, 5.0).log_prob(mu)
        log_p = log_p + dist.Normal(mu.unsqueeze(-1), tau.unsqueeze(-1)).log_prob(theta).sum(-1)
        log_p = log_p + dist.Normal(theta, ERRORS).log_prob(EFFECTS).sum(-1)
        pyro.factor("rest", log_p - dist.Normal(0.0, 5.0).log_prob(z).sum(-1))

    result = fit(model, seed=seed, progress_bar=False)
    # Quadrature over log tau: .8077 and 1.1712; log evidence -31.3113. Errors .01 sds, 1 % and .002.
    assert abs(float(result.mean("z")[0]) - 0.8077) < 0.05
    assert abs(float(result.sd("z")[0]) / 1.1712 - 1) < 0.04
    assert abs(result.log_evidence + 31.3113) < 0.01
