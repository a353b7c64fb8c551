"""Models that people have, and what becomes of the draws that such a model cannot take."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import (
    AdaAnnSVI,
    AnnealedSMC,
    AutoPlanar,
    AutoRealNVP,
    AutoSpline,
    NaturalStep,
    diagnose,
    importance_draws,
    natural_svi,
)
from pyro_adaann.diagnostics.model_and_guide import plate_nesting
from pyro_adaann.fitting.models import check_model
from pyro_adaann.objectives.lenient import Leniency, Violations
from pyro_adaann.processes.rows import Rows, SplitDistribution
from pyro_adaann.sampling.density import UnconstrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:Encountered")


def covariance() -> None:
    """A correlation that rounds to one: the covariance is finite and not positive definite."""
    r = torch.tanh(3 * pyro.sample("a", dist.Normal(0.0, 3.0)))
    one = torch.ones_like(r)
    matrix = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), matrix), obs=torch.tensor([0.5, 0.7]))


def cut_points() -> None:
    """Ordered cut points that round to equal."""
    c = pyro.sample("c", dist.Normal(torch.zeros(2), 8.0).to_event(1))
    low = 1e6 * c[..., 0]  # where single precision has steps of 1/16
    cuts = torch.stack([low, low + torch.nn.functional.softplus(c[..., 1])], -1)
    pyro.sample("y", dist.OrderedLogistic(low, cuts), obs=torch.tensor(1))


def gaussian_process() -> None:
    """A kernel matrix that the model factorizes itself, with lognormal priors."""
    length = pyro.sample("length", dist.LogNormal(0.0, 2.0))[..., None, None]
    noise = pyro.sample("noise", dist.LogNormal(-3.0, 3.0))[..., None, None]
    x = torch.linspace(0.0, 1.0, 30)
    kernel = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + noise**2 * torch.eye(30)
    tril = torch.linalg.cholesky(kernel)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(30), scale_tril=tril), obs=torch.sin(5 * x))


MODELS = (covariance, cut_points, gaussian_process)


def with_adam(model: object, *, vectorize: bool = True) -> AdaAnnSVI:
    elbo = Trace_ELBO(20, vectorize_particles=vectorize, max_plate_nesting=0)
    guide = AutoPlanar(model, num_transforms=2, base_scale=3.0)
    return AdaAnnSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_draw_that_the_model_cannot_take_is_broken_and_the_fit_goes_on(model, vectorize):
    """Of 10 steps of 20 draws with sd 3 all are fine with probability below 1e-6."""
    svi = with_adam(model, vectorize=vectorize)
    for _ in range(10):
        svi.step()
    stages = svi.history.stages
    assert svi.history.num_steps == 10
    assert 0 < sum(stage.num_broken for stage in stages) < sum(stage.num_particles for stage in stages)


@pytest.mark.parametrize("model", MODELS)
def test_natural_steps_diagnostics_and_samplers_go_on_too(model):
    guide = AutoPlanar(model, num_transforms=2, base_scale=3.0)
    svi = AdaAnnSVI(model, guide, NaturalStep(100, max_plate_nesting=0), path="bridge")
    for _ in range(3):
        svi.step()
    assert diagnose((model, guide), num_samples=300).num_broken > 0
    assert math.isfinite(importance_draws((model, guide), num_samples=300).log_weights.max())


def test_the_others_of_a_batch_keep_their_densities_and_gradients():
    good = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    bad = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    batch = torch.stack([good, bad]).requires_grad_()
    leniency = Leniency()
    tril = leniency.insist(lambda: torch.linalg.cholesky(batch))
    expected = torch.linalg.cholesky(good)
    assert torch.equal(tril[0], expected)
    assert bool(tril[1].isnan().all())
    tril[0].sum().backward()
    alone = good.clone().requires_grad_()
    torch.linalg.cholesky(alone).sum().backward()
    assert torch.allclose(batch.grad[0], alone.grad)


def test_a_finite_density_of_a_parameter_out_of_range_counts_as_none():
    """lgamma is finite at -1.5, and so would be the density."""
    with pyro.validation_enabled(False), Violations():
        fn = dist.Gamma(torch.tensor([2.0, -1.5]), 1.0)
        assert bool(torch.isfinite(fn.log_prob(torch.ones(2))).all())
        trace = pyro.poutine.trace(lambda: pyro.sample("g", fn, obs=torch.ones(2))).get_trace()
        density = trace.nodes["g"]["fn"].log_prob(torch.ones(2))
    assert math.isclose(float(density[0]), -1.0)
    assert math.isnan(float(density[1]))


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (
            covariance,
            r".*covariance_matrix is not PositiveDefinite.* at site 'y'",
        ),
        (cut_points, r"cutpoints is not OrderedVector\(\) in the OrderedLogistic at site 'y'"),
        (gaussian_process, r"linalg.cholesky: .*not positive-definite.*at site 'y'"),
    ],
)
def test_a_verdict_says_what_has_broken_draws(model, cause):
    pyro.set_rng_seed(0)
    diagnosis = diagnose((model, AutoPlanar(model, 2, base_scale=3.0).initialize()), num_samples=300)
    assert diagnosis.num_broken > 0
    assert re.search(cause, diagnosis.broken_cause)
    assert re.search(rf"broken draws +{diagnosis.num_broken} \(.*\): {cause}", str(diagnosis))
    assert diagnosis.has_many_broken == bool(re.search(cause, diagnosis.verdict))


@pytest.mark.parametrize("seed", range(8))
def test_the_runs_that_find_the_sites_take_any_draw(seed):
    pyro.set_rng_seed(seed)  # one of three prior draws has no factorization
    assert plate_nesting(check_model(covariance, (), {})) == 0
    pyro.set_rng_seed(seed)
    assert UnconstrainedModel(covariance, (), {}).dim == 1


def test_rows_of_one_process_are_watched_too():
    own = dist.Gamma(torch.tensor([2.0, -1.0]), 1.0, validate_args=False)
    shared = SplitDistribution("y", own, Rows(total=4, start=0, stop=2, dim=-1))
    watch = Violations()
    watch._pyro_post_sample({"name": "y", "fn": shared, "is_observed": True, "value": torch.tensor(1.0)})
    density = shared.base_dist.log_prob(torch.tensor(1.0))
    assert torch.isfinite(density).tolist() == [True, False]
    assert watch.violated == {"y": "concentration is not GreaterThan(lower_bound=0.0) in the Gamma"}
    # A latent value has the rows of all processes.
    own = dist.LogNormal(torch.tensor([2.0, 1.0]), 1.0, validate_args=False)
    shared = SplitDistribution("z", own, Rows(total=4, start=2, stop=4, dim=-1))
    value = torch.tensor([0.0, 1.0, 0.0, 1.0])
    watch._pyro_post_sample({"name": "z", "fn": shared, "is_observed": False, "value": value})
    assert torch.isfinite(shared.base_dist.log_prob(value[2:])).tolist() == [False, True]
    assert "z" in watch.violated


def test_a_model_that_takes_no_draw_says_at_which_site_and_why():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, -1.0 - z**2), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match=r"finite loss.*y") as caught:
        with_adam(model).step()
    assert "Expected parameter scale" in str(caught.value.__cause__)


@pytest.mark.parametrize("model", MODELS[:2])
def test_annealed_smc_takes_them_as_broken(model):
    result = AnnealedSMC(model, num_particles=192).run(progress_bar=False)
    assert math.isfinite(result.log_evidence)


def local_latents():
    center = pyro.sample("center", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2000, subsample_size=100):
        z = pyro.sample("z", dist.Normal(center, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(100))


@pytest.mark.parametrize("kind", [AutoPlanar, AutoRealNVP, AutoSpline])
def test_local_latents_of_a_sub_sample_are_refused_by_a_flow(kind):
    with pytest.raises(ValueError, match=r"'z' in plate 'rows', of which 100 of 2000 are drawn.*AutoNormal"):
        kind(local_latents)()
    with pytest.raises(ValueError, match="'z' in plate 'rows'"):
        natural_svi(local_latents).step()


@pytest.mark.parametrize(("num_latents", "num_warnings"), [(100, 0), (600, 1)])
def test_natural_steps_for_hundreds_of_latents_say_so_at_the_start(num_latents, num_warnings, recwarn):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([num_latents]).to_event(1))

    pyro.set_rng_seed(0)
    svi = natural_svi(model, AutoNormal(model), num_particles=10, path="joint")
    for _ in range(2):
        svi.step()
    found = [w for w in recwarn if "600" in str(w.message) and "AutoLowRank" in str(w.message)]
    assert len(found) == num_warnings


class Triangular(dist.TorchDistribution):
    """A density of the user's own, without constraints of its parameters."""

    support = dist.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value):
        return -(value - self.loc).abs()

    def sample(self, sample_shape=()):
        return self.loc.expand(self.shape(sample_shape))

    def expand(self, batch_shape, _instance=None):
        return Triangular(self.loc.expand(batch_shape))


def test_a_distribution_that_names_no_constraints_is_taken():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", Triangular(z), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    svi = natural_svi(model, AutoPlanar(model, 2), num_particles=20)
    assert math.isfinite(svi.step())
    assert math.isfinite(diagnose(svi, num_samples=100).log_evidence)
