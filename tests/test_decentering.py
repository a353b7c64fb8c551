"""Hierarchies are fitted in coordinates without a funnel, and results speak of the model's own sites."""

from __future__ import annotations

import fit_targets
import fit_targets_more
import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_models import errors, is_right
from pyro import poutine
from pyro.contrib.autoname import scope
from torch import Tensor
from torch.distributions import constraints

from pyro_adaann import WeightedDraws, fit
from pyro_adaann.fitting import decentering, pilot
from pyro_adaann.fitting.attempts import make_guide
from pyro_adaann.fitting.clock import Clock
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.decentering import Start, _Choice, choose_start
from pyro_adaann.fitting.progress import FitProgress
from pyro_adaann.objectives.one_by_one import one_by_one
from pyro_adaann.sampling.missing import without_missing
from pyro_adaann.state.interrupt import InterruptGuard

# --- conversion of draws -------------------------------------------------------------------------------


def groups():
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.tensor([0.5, 1.0, -1.0, 2.0]))


def vectors():
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau).to_event(1))
        pyro.sample("y", dist.Normal(theta[..., 0] * theta[..., 1], 1.0), obs=torch.ones(3))


def chain():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    first = pyro.sample("first", dist.Normal(0.0, scale))
    second = pyro.sample("second", dist.StudentT(5.0, first, scale))
    third = pyro.sample("third", dist.Laplace(second, 2 * scale))
    pyro.sample("y", dist.Normal(third, 1.0), obs=torch.tensor(1.0))


def two_plates():
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
    with rows:
        row = pyro.sample("row", dist.Normal(0.0, tau))
    with columns:
        column = pyro.sample("column", dist.Normal(0.0, 2 * tau))
    with rows, columns:
        cell = pyro.sample("cell", dist.Normal(row + column, tau))
        pyro.sample("y", dist.Normal(cell, 1.0), obs=torch.ones(3, 2))


def rates():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    omega = pyro.sample("omega", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3):
        rate = pyro.sample(
            "rate", dist.LogNormal(mu.unsqueeze(-1) + torch.zeros(2), omega.unsqueeze(-1)).to_event(1)
        )
        pyro.sample("y", dist.Poisson(rate.sum(-1)), obs=torch.tensor([1.0, 2.0, 4.0]))


KINDS = {
    "log normal": (rates, {"rate": torch.zeros(3, 2)}),
    "some of a log normal": (rates, {"rate": torch.eye(3)[:, :2]}),
    "all of a plate": (groups, {"theta": torch.zeros(4)}),
    "some of a plate": (groups, {"theta": torch.tensor([1.0, 0.0, 0.0, 1.0])}),
    "vectors": (vectors, {"theta": torch.tensor([[0.0, 1.0]] * 3)}),
    "a chain of numbers": (chain, {name: torch.zeros(()) for name in ("first", "second", "third")}),
    "a part of a chain": (chain, {"second": torch.zeros(())}),
    "two plates": (
        two_plates,
        {"row": torch.zeros(3, 1), "column": torch.zeros(2), "cell": torch.eye(3)[:, :2]},
    ),
    "none": (groups, {}),
}


def log_density(model, samples: dict[str, Tensor], num: int) -> Tensor:
    """Return log densities, each by a run of its own, and fill in what is drawn."""
    found = []
    for i in range(num):
        values = {name: value[i] for name, value in samples.items()}
        found.append(poutine.trace(poutine.condition(model, data=values)).get_trace().log_prob_sum())
    return torch.stack(found).double().detach()


def prior_draws(model, num: int) -> dict[str, Tensor]:
    traces = [poutine.trace(model).get_trace() for _ in range(num)]
    names = [
        name
        for name in traces[0].stochastic_nodes
        if "fn" in traces[0].nodes[name]
        and traces[0].nodes[name]["name"] not in ("groups", "rows", "columns")
    ]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_draws_and_densities_are_those_of_the_model_and_back(kind, monkeypatch):
    model, centered = KINDS[kind]
    monkeypatch.setattr("pyro_adaann.fitting.coordinates._BATCH_SIZE", 5)
    pyro.set_rng_seed(0)
    coordinates, num = Coordinates(model, (), {}, centered), 12
    samples = prior_draws(coordinates.model, num)
    assert len(centered) == sum(name.endswith("_decentered") for name in samples)
    log_p = log_density(coordinates.model, samples, num)
    log_q = torch.randn(num).double()
    draws = coordinates.restore(WeightedDraws(samples, log_p, log_q, log_p - log_q, 0.0))
    own = set(poutine.trace(model).get_trace().stochastic_nodes) - {"groups", "rows", "columns"}
    assert set(draws.samples) == own
    assert draws.log_p.tolist() == pytest.approx(log_density(model, draws.samples, num).tolist(), abs=1e-4)
    assert (draws.log_p - draws.log_q).tolist() == pytest.approx((log_p - log_q).tolist(), abs=1e-9)
    back, log_scales = coordinates.enter(draws.samples)
    for name, values in samples.items():
        torch.testing.assert_close(back[name], values, atol=1e-4, rtol=1e-3)
    assert (log_p - draws.log_p).tolist() == pytest.approx((log_scales + torch.zeros(num)).tolist(), abs=1e-4)


def test_draws_without_weight_stay_what_they_are_and_get_none():
    """One at which the model breaks, and one that its data exclude."""

    def fragile():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 2):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Poisson(theta.exp()), obs=torch.ones(2))

    samples = {"tau": torch.tensor([1.0, torch.inf, 2.0, 3.0]), "theta_decentered": torch.ones(4, 2)}
    log_p = torch.tensor([0.0, torch.nan, 0.0, -torch.inf]).double()
    zero = torch.zeros(4).double()
    coordinates = Coordinates(fragile, (), {}, {"theta": torch.zeros(2)})
    draws = coordinates.restore(WeightedDraws(samples, log_p, zero, log_p, 0.0))
    assert draws.samples["theta"][[0, 2, 3]].tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert torch.isfinite(draws.log_p - draws.log_q).tolist() == [True, False, True, False]
    assert draws.log_p[3] == -torch.inf


def test_particles_are_not_run_twice_in_the_same_coordinates(monkeypatch):
    """Neither where they did not arrive, nor where they lag; and once more in new coordinates."""
    num = 20
    args = torch.full((num,), 50.0), torch.zeros(num)
    kept = choose(known_and_unknown, *args)
    assert kept.has_run
    assert kept.base is not None
    monkeypatch.setattr(decentering, "base_at", lambda result: None)
    assert not choose(known_and_unknown, *args).has_run  # decentered, and the particles were not
    assert choose(known_and_unknown, torch.full((num,), 0.05), torch.cat([Y, Y, Y])[:num]).has_run
    assert choose(known_and_unknown, *args, budget=1e-9).has_run
    calls = []
    monkeypatch.setattr("pyro_adaann.fitting.attempts.pilot_base", lambda *_: calls.append(1))
    for has_run, count in ((True, 0), (False, 1)):
        start = Start(Coordinates(known_and_unknown, args, {}), None, has_run)
        monkeypatch.setattr("pyro_adaann.fitting.fit.choose_start", lambda *_, start=start: start)
        fit(known_and_unknown, *args, seed=0, budget=1e-3, progress_bar=False)
        assert len(calls) == count


def test_a_site_that_is_missing_is_named():
    with pytest.raises(ValueError, match="got none of theta"):
        Coordinates(groups, (), {}, {"theta": torch.zeros(4)}).enter({"mu": torch.zeros(3)})


# --- the choice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_funnel_is_closer_to_a_normal_distribution_without_its_scale(scale):
    """x_i = e^(1 + z / 2) e_i, z ~ N(0, s^2): k leaves of variance e^(2 + s^2 / 2), a gain of k s^2 / 4.

    Of 400,000 draws the log variance of a leaf has an error of about .01.
    """
    torch.manual_seed(0)
    z = scale * torch.randn(400_000, 1).double()
    leaves = torch.randn(400_000, 2).double()
    log_scales, weights = (1 + z / 2).expand(-1, 2), torch.full((400_000,), 1 / 400_000).double()
    none, all_of_them = torch.tensor([False, False]), torch.tensor([True, True])
    choice = _Choice(torch.cat([z, leaves * log_scales.exp()], 1), leaves, log_scales, weights)
    gain = choice.divergence(none, [1, 2]) - choice.divergence(all_of_them, [1, 2])
    assert gain == pytest.approx(2 * scale**2 / 4, abs=0.03)
    assert choice.best([1, 2]).tolist() == [True, True]
    # The other way round: what is normal as it is. Where that is not clear, all are decentered.
    choice = _Choice(torch.cat([z, leaves], 1), leaves / log_scales.exp(), log_scales, weights)
    gain = choice.divergence(all_of_them, [1, 2]) - choice.divergence(none, [1, 2])
    assert gain == pytest.approx(2 * scale**2 / 4, abs=0.03)
    assert choice.best([1, 2]).tolist() == [scale == 0.5] * 2


def choose(model, *args, seed: int = 0, budget: float | None = None):
    with pyro.get_param_store().scope():
        guide = make_guide(model, {}, args, {})
        with FitProgress(False) as progress, InterruptGuard() as interrupt:
            return choose_start(model, args, {}, guide, seed, (progress, Clock(budget), interrupt))


def known_and_unknown(noise: Tensor, y: Tensor):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


Y = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4, 1.2, 0.6, -0.2])


def test_numbers_of_which_the_data_say_much_stay_and_the_others_are_decentered():
    much, little = torch.full((8,), 0.05), torch.full((8,), 5.0)
    assert choose(known_and_unknown, much, Y).coordinates.centered == {}
    assert choose(known_and_unknown, little, Y).coordinates.centered["theta"].tolist() == [0.0] * 8
    both = torch.tensor([0.05] * 2 + [5.0] * 8)
    found = choose(known_and_unknown, both, torch.cat([Y, Y])[:10]).coordinates
    assert found.centered["theta"].tolist() == [1.0] * 2 + [0.0] * 8


def test_particles_of_many_latents_are_where_the_first_guide_starts():
    """Mean and width of the coordinates that are fitted: of decentered numbers without data 0 and 1.5."""
    num = 20
    loc, factor = choose(known_and_unknown, torch.full((num,), 50.0), torch.zeros(num)).base
    assert loc.shape == (num + 2,)
    # The weighted mean of 1,024 particles that may be correlated by half.
    assert loc[2:].abs().max() < 0.25
    assert torch.linalg.norm(factor, dim=1)[2:].sub(1.5).abs().max() < 0.3
    assert choose(known_and_unknown, torch.full((8,), 50.0), Y).base is None


def test_a_density_in_parts_or_of_another_kind_is_fitted_as_it_is():
    def masked(y):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", 2), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("theta", dist.Normal(0.0, tau))

    def scaled(y):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with poutine.scale(scale=2.0):
            pyro.sample("theta", dist.Normal(0.0, tau))

    def positive(y):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        pyro.sample("theta", dist.HalfNormal(tau))

    def constant(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("theta", dist.Normal(mu, 1.0))

    def labelled(y):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        label = pyro.sample("label", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(label, 1.0), obs=y)

    def taken(y):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("theta_decentered", dist.Normal(0.0, 1.0))

    def variable(y):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        pyro.sample("theta", dist.Normal(0.0, tau))

    def log_normal(y):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        pyro.sample("theta", dist.LogNormal(0.0, tau))

    names = {
        model.__name__: list(decentering._sites_of_variable_scale(model, (torch.tensor(0.0),), {}))
        for model in (masked, scaled, positive, constant, labelled, taken, variable, log_normal)
    }
    assert names.pop("variable") == ["theta"]
    assert names.pop("log_normal") == ["theta"]
    assert not any(names.values()), names


class OfVariance(dist.TorchDistribution):
    """A normal distribution that calls its variance a scale."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012, as torch does
    support, has_rsample = constraints.real, True

    def __init__(self, loc, scale, validate_args=None):
        self.loc, self.scale = torch.distributions.utils.broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, shape, _instance=None):
        return OfVariance(self.loc.expand(shape), self.scale.expand(shape))

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008, as torch does
        return dist.Normal(self.loc, self.scale.sqrt()).rsample(sample_shape)

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale.sqrt()).log_prob(value)


def of_variance(y):
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    theta = pyro.sample("theta", OfVariance(0.0, tau))
    pyro.sample("y", dist.Normal(theta, 5.0), obs=y)


def stable(y):
    """In Nolan's older coordinates, which a copy of the distribution forgets."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    theta = pyro.sample("theta", dist.StableWithLogProb(1.5, 0.9, tau, 0.0, coords="S"))
    pyro.sample("y", dist.Normal(theta, 5.0), obs=y)


def prefixed(y):
    def base(y):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 5.0), obs=y)

    return scope(base, prefix="group")(y)


def with_missing_values(y):
    """Known values of a site have the density of data, and so has what is fitted in place of the others."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    known = torch.tensor([True, True, False])
    with pyro.plate("rows", 3):
        x = pyro.sample("x", dist.Normal(1.0, tau), obs=torch.tensor([0.5, 2.0, 0.0]), obs_mask=known)
        pyro.sample("y", dist.Normal(x, 5.0), obs=y.expand(3))


def variable(y):
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    theta = pyro.sample("theta", dist.Normal(0.0, tau))
    pyro.sample("y", dist.Normal(theta, 5.0), obs=y)


def has_variable_scale(model):
    model = without_missing(model, (torch.tensor(1.0),), {})
    return bool(decentering._sites_of_variable_scale(model, (torch.tensor(1.0),), {}))


@pytest.mark.parametrize("model", [of_variance, stable, prefixed, with_missing_values])
def test_what_has_another_density_in_other_coordinates_is_fitted_as_it_is(model, monkeypatch):
    """A family that is none, a copy that forgets, handlers that rename new sites or do something to them."""
    y = torch.tensor(1.0)
    wrapped = without_missing(model, (y,), {})
    monkeypatch.setattr(pilot, "_NUM_PARTICLES", 128)  # the density of a stable distribution is an integral
    assert has_variable_scale(model)
    assert choose(wrapped, y).coordinates.centered == {}
    monkeypatch.setattr(decentering, "_agree", lambda *_: True)
    assert choose(wrapped, y).coordinates.centered  # so it is the comparison that finds it


def test_a_density_that_is_the_same_in_other_coordinates_is_found_so():
    assert choose(variable, torch.tensor(1.0)).coordinates.centered["theta"].tolist() == 0.0


def test_a_site_of_several_families_is_fitted_as_it_is():
    def branches(y):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        of_scale = dist.Normal(0.0, tau)
        pyro.sample("theta", of_scale if z > 0 else of_scale.mask(True))

    found = []
    for seed in range(8):  # in all but one of 64 runs of eight both families are there
        pyro.set_rng_seed(seed)
        found.append(list(decentering._sites_of_variable_scale(branches, (torch.tensor(1.0),), {})))
    assert [] in found


def test_a_draw_at_which_the_model_breaks_does_not_end_the_way_back():
    """It has no weight, and the others have the values and densities that they have alone."""

    def breaks():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        half = torch.linalg.cholesky(torch.eye(2) * (2.0 - scale)[..., None, None])
        mean = half[..., 0, 0]
        other = pyro.sample("other", dist.Normal(mean, scale))
        pyro.sample("y", dist.Normal(theta + other, 1.0), obs=torch.tensor(1.0))

    samples = {
        "scale": torch.tensor([0.5, 3.0, 1.5]),
        "theta_decentered": torch.tensor([1.0, -1.0, 0.5]),
        "other_decentered": torch.tensor([0.3, 0.7, -1.0]),
    }
    numbers = torch.tensor([-1.0, -torch.inf, -2.0])
    draws = WeightedDraws(samples, numbers, torch.zeros(3), numbers, 0.5)
    centered = {"theta": torch.zeros(()), "other": torch.zeros(())}
    found = Coordinates(breaks, (), {}, centered).restore(draws)
    kept = torch.tensor([0, 2])
    alone = WeightedDraws(
        {name: values[kept] for name, values in samples.items()},
        numbers[kept], torch.zeros(2), numbers[kept], 0.5,
    )  # fmt: skip
    expected = Coordinates(breaks, (), {}, centered).restore(alone)
    for name in ("scale", "theta", "other"):
        torch.testing.assert_close(found.samples[name][kept], expected.samples[name])
        assert torch.isfinite(found.samples[name]).all()
    torch.testing.assert_close(found.log_p[kept], expected.log_p)
    assert found.log_p[1] == -torch.inf


def test_without_particles_a_model_is_fitted_as_it_is(monkeypatch):
    little = torch.full((8,), 5.0)
    assert choose(one_by_one(known_and_unknown), little, Y).coordinates.centered == {}
    assert choose(known_and_unknown, little, Y, budget=1e-9).coordinates.centered == {}
    monkeypatch.setattr("pyro_adaann.fitting.pilot.process_count", lambda: 2)
    assert choose(known_and_unknown, little, Y).coordinates.centered == {}


def test_the_choice_leaves_random_states_as_they_are():
    pyro.set_rng_seed(3)
    before = torch.get_rng_state()
    decentering._sites_of_variable_scale(known_and_unknown, (torch.full((8,), 5.0), Y), {})
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_centered_eight_schools_and_the_funnel_are_whole(seed):
    """Centered, 1 to 10 % of the first were lost without a word, and the second was called unreliable."""
    for target in (fit_targets_more.eight_schools(), fit_targets.funnel()):
        result = fit(target.model, *target.args, seed=seed, progress_bar=False)
        assert is_right(errors(target, result))
        assert result.log_evidence == pytest.approx(target.log_evidence, abs=0.006)
        assert result.is_good
