"""A model that runs for one draw after the other is the model that runs for many at once."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoSpline,
    ConstantSchedule,
    ESSStageRule,
    diagnose,
    fit,
    importance_draws,
    natural_svi,
    one_by_one,
    to_arviz,
)
from pyro_adaann.fitting.models import for_many_draws
from pyro_adaann.fitting.predictions import predict

X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
Y = torch.tensor([0.1, 0.8, 2.3, 3.9])
MASK = torch.tensor([True, True, False, True])


def at_once(y=Y):
    """A regression that vectorizes, with plates, a mask, a scale and a deterministic site."""
    with pyro.plate("coefficients", 2):
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    mean = pyro.deterministic("mean", (X * beta.unsqueeze(-2)).sum(-1))
    with pyro.plate("data", 4), poutine.scale(scale=2.0), poutine.mask(mask=MASK):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)
        pyro.deterministic("size", mean.abs(), event_dim=0)
    pyro.factor("near", -(sigma**2))


def alone(y=Y):
    """The same, with a product of matrices that knows no further dimensions."""
    with pyro.plate("coefficients", 2):
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    mean = pyro.deterministic("mean", X @ beta.reshape(2))
    with pyro.plate("data", 4), poutine.scale(scale=2.0), poutine.mask(mask=MASK):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)
        pyro.deterministic("size", mean.abs(), event_dim=0)
    pyro.factor("near", -(sigma**2))


def traces(model):
    guide = AutoSpline(model, base_scale=2.0).initialize()
    pyro.set_rng_seed(3)
    elbo = Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    run = one_by_one(model) if model is alone else model
    return next(iter(elbo._get_traces(run, guide, (), {})))


def test_sites_are_those_of_the_model_that_vectorizes():
    pyro.set_rng_seed(0)
    expected, _ = traces(at_once)
    pyro.set_rng_seed(0)
    got, _ = traces(alone)
    for name in ("beta", "sigma", "y", "near"):
        torch.testing.assert_close(got.nodes[name]["log_prob"], expected.nodes[name]["log_prob"])
        value = got.nodes[name]["value"]
        torch.testing.assert_close(value, expected.nodes[name]["value"].expand(value.shape))
    mean = got.nodes["mean"]["value"]
    torch.testing.assert_close(mean.reshape(6, 4), expected.nodes["mean"]["value"])


def test_gradients_are_those_of_the_model_that_vectorizes():
    found = []
    for model in (at_once, alone):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoSpline(model, base_scale=2.0).initialize()
        pyro.set_rng_seed(1)
        elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
        loss = elbo.differentiable_loss(one_by_one(model) if model is alone else model, guide)
        found.append(torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True))
    for expected, got in zip(*found, strict=True):
        assert (expected is None) == (got is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_natural_steps_are_the_same():
    losses = []
    for model in (at_once, alone):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoSpline(model, base_scale=2.0).initialize()
        pyro.set_rng_seed(1)
        svi = natural_svi(one_by_one(model) if model is alone else model, guide, num_particles=30)
        losses.append([svi.step() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_predictions_and_priors_have_all_draws():
    pyro.set_rng_seed(0)
    posterior = {"beta": torch.tensor([[0.0, 1.0], [5.0, -1.0]]), "sigma": torch.full((2,), 1e-3)}
    model = poutine.uncondition(one_by_one(alone))
    for parallel in (True, False):
        got = Predictive(model, posterior, parallel=parallel, return_sites=("y", "mean"))()
        expected = posterior["beta"] @ X.T
        torch.testing.assert_close(got["mean"].reshape(2, 4), expected)
        torch.testing.assert_close(got["y"], expected, rtol=0, atol=0.01)
    prior = Predictive(one_by_one(alone), num_samples=400, parallel=True)()
    assert prior["beta"].shape == (400, 2)
    # Standard errors of .1 and .025: beyond five of them with probability 2e-6.
    assert (prior["beta"].mean(0).abs() < 0.5).all()
    assert abs(float(prior["sigma"].log().mean()) + 1) < 0.125
    torch.testing.assert_close(prior["mean"].reshape(400, 4), prior["beta"] @ X.T)


def test_predictions_of_sites_with_dimensions_of_their_own():
    posterior = {"linear.weight": torch.tensor([[[0.0, 1.0]], [[5.0, -1.0]], [[1.0, 1.0]]])}
    got = Predictive(one_by_one(Regression()), posterior, parallel=True, return_sites=("_RETURN", "y"))(X)
    # Noise of sd .5: beyond five of them with probability 7e-6.
    assert ((got["y"].reshape(3, 4) - posterior["linear.weight"][:, 0] @ X.T).abs() < 2.5).all()


def test_diagnosis_and_export_take_it():
    pyro.set_rng_seed(0)
    guide = AutoSpline(alone, base_loc="prior", base_scale="prior").initialize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagnosis = diagnose((one_by_one(alone), guide), num_samples=100)
        data = to_arviz((one_by_one(alone), guide), num_samples=50)
    assert diagnosis.num_samples == 100
    assert data["log_likelihood"]["y"].shape[-1] == 4


class Regression(PyroModule):
    """The regression of Pyro's tutorial: a torch module with weights from a prior."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1, bias=False)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def test_fit_runs_what_does_not_vectorize_one_by_one():
    model = Regression()
    guide = AutoSpline(model).initialize(X, Y)
    with pytest.warns(UserWarning, match="one after the other"):
        runs = for_many_draws(model, guide, (X, Y), {})
    assert runs is not model
    vectorizing_guide = AutoSpline(at_once).initialize()
    assert for_many_draws(at_once, vectorizing_guide, (), {}) is at_once


@pytest.mark.slow
def test_fit_of_a_module_is_the_conjugate_posterior():
    with pytest.warns(UserWarning, match="one after the other"):
        result = fit(Regression(), X, Y, seed=0, progress_bar=False)
    precision = torch.eye(2) + X.T @ X / 0.25
    mean = torch.linalg.solve(precision, X.T @ Y / 0.25)
    sd = precision.inverse().diagonal().sqrt()
    assert ((result.mean("linear.weight").reshape(2) - mean).abs() < 0.1 * sd).all()
    assert result.predictive(num_samples=10)["y"].shape == (10, 4)
    assert result.diagnosis.level.headline in ("GOOD", "USABLE WITH WEIGHTS")


def test_what_cannot_be_put_together_is_refused():
    def branches():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        else:
            pyro.sample("w", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    pyro.set_rng_seed(0)
    with (
        pytest.raises(ValueError, match="same sites in the run of every draw"),
        pyro.plate("draws", 20, dim=-1),
    ):
        one_by_one(branches)()

    def grows():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(1 + int(z > 0)), 1.0).to_event(1), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match="site 'x' with shape"), pyro.plate("draws", 20, dim=-1):
        one_by_one(grows)()
    with (
        pytest.raises(ValueError, match="one plate of draws"),
        pyro.plate("a", 2, dim=-1),
        pyro.plate("b", 2, dim=-2),
    ):
        one_by_one(alone)()


def test_discrete_latent_sites_are_refused():
    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        which = pyro.sample("which", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(X[1] @ loc + which, 1.0), obs=torch.tensor(0.0))

    with (
        pytest.raises(ValueError, match=r"Expected continuous latent sites.* got 'which'"),
        pyro.plate("draws", 5, dim=-1),
    ):
        one_by_one(model)()
    with pytest.raises(ValueError, match="Expected continuous"):
        fit(model, seed=0, progress_bar=False)


def mixture(at_once: bool):
    """That of Pyro's tutorial, whose index knows no further dimensions, and one that vectorizes."""
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    @config_enumerate
    def model():
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("components", 2), poutine.scale(scale=2.0):
            locs = pyro.sample("locs", dist.Normal(5.0, 10.0))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(weights))
            loc = Vindex(locs.unsqueeze(-2))[..., k] if at_once else locs[k]
            pyro.sample("x", dist.Normal(loc, scale), obs=data)

    return model if at_once else one_by_one(model)


def test_enumerated_sites_are_summed_out():
    found = []
    for at_once in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoSpline(poutine.block(mixture(True), hide=["k"]), base_scale=2.0).initialize()
        model = mixture(at_once)
        pyro.set_rng_seed(1)
        draws = importance_draws((model, guide), num_samples=30)
        pyro.set_rng_seed(1)
        loss = TraceEnum_ELBO(
            num_particles=5,
            vectorize_particles=True,
            max_plate_nesting=1,
            strict_enumeration_warning=False,
        )
        value = loss.loss_and_grads(model, guide)
        gradients = [p.grad for p in guide.parameters() if p.grad is not None]
        pyro.set_rng_seed(1)
        step = natural_svi(model, guide, num_particles=10).step()
        found.append([draws.log_p, torch.tensor(value), *gradients, torch.tensor(step)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", ["bridge", "likelihood", "joint"])
def test_enumerated_sites_are_tempered_on_every_path(path):
    found = []
    for at_once in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoSpline(poutine.block(mixture(True), hide=["k"]), base_scale=2.0).initialize()
        pyro.set_rng_seed(1)
        schedule = AdaAnnSchedule(0.5, initial_inverse_temperature=0.01)
        rule = ESSStageRule(0.01, max_num_steps=1)
        svi = natural_svi(
            mixture(at_once), guide, num_particles=20, path=path, schedule=schedule, stage_rule=rule
        )
        losses = [svi.step() for _ in range(4)]
        found.append(torch.tensor([*losses, *(stage.inverse_temperature for stage in svi.history.stages)]))
    assert len(found[0]) > 6  # the log factor has moved t
    torch.testing.assert_close(*found, rtol=3e-3, atol=3e-3)


def test_enumerated_sites_are_predicted_and_exported():
    model = mixture(False)
    guide = AutoSpline(poutine.block(mixture(True), hide=["k"]), base_scale=2.0).initialize()
    draws = importance_draws((model, guide), num_samples=30)
    predicted = predict(model, {name: value[:4] for name, value in draws.samples.items()}, (), {})
    assert {name: tuple(value.shape) for name, value in predicted.items()} == {"k": (4, 5), "x": (4, 5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a guide that is not fitted
        data = to_arviz((model, guide), num_samples=200)
    assert data["posterior_predictive"]["x"].shape[-1] == 5
    assert data["log_likelihood"]["x"].shape[-1] == 5


def test_continuous_sites_that_depend_on_enumerated_ones_are_refused():
    @config_enumerate
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match="Expected site 'z' with shape"), pyro.plate("draws", 5, dim=-1):
        one_by_one(model)()


@pytest.mark.slow
def test_fit_takes_the_mixture_of_the_tutorial():
    with pytest.warns(UserWarning, match="one after the other"):
        result = fit(mixture(False)._model, seed=0, progress_bar=False)
    expected = fit(mixture(True), seed=0, progress_bar=False)
    assert abs(result.log_evidence - expected.log_evidence) < 0.1


def learns(at_once: bool):
    def model():
        noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
        shift = pyro.param("shift", torch.tensor(0.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = (X * beta.unsqueeze(-2)).sum(-1) if at_once else X @ beta
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(mean + shift, noise), obs=Y)

    return model if at_once else one_by_one(model)


def test_parameters_of_the_model_are_trained():
    found = []
    for at_once in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = learns(at_once)
        svi = AdaAnnSVI(
            model,
            AutoNormal(learns(True), init_scale=0.3),
            pyro.optim.Adam({"lr": 0.05}),
            Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1),
            schedule=ConstantSchedule(),
        )
        for _ in range(3):
            svi.step()
        found.append([pyro.param("noise").detach(), pyro.param("shift").detach()])
    assert abs(float(found[0][1])) > 0.05
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_natural_steps_refuse_parameters_of_the_model():
    for at_once in (True, False):
        pyro.clear_param_store()
        svi = natural_svi(learns(at_once), AutoSpline(learns(True)), num_particles=5)
        with pytest.raises(ValueError, match="noise"):
            svi.step()


class _Odd(Exception):
    """An error that no library raises."""


def _asserts(z):
    assert z.shape == ()
    return z


def _raises(z):
    if z.dim():
        raise _Odd("one draw at a time, please")
    return z


@pytest.mark.parametrize(
    "use",
    [
        _asserts,
        _raises,
        lambda z: math.sinh(z),
        lambda z: float(z),
        lambda z: z.item(),
        lambda z: {0: z}[z.dim()],
    ],
    ids=["assert", "own error", "math", "float", "item", "key"],
)
def test_code_for_one_draw_is_run_one_by_one_whatever_it_raises(use):
    def model():
        z = pyro.sample("z", dist.Normal(3.0, 0.1))
        pyro.sample("x", dist.Normal(use(z), 1.0), obs=torch.tensor(0.0))

    guide = AutoSpline(model, base_loc="prior", base_scale="prior").initialize()
    assert abs(float(guide.get_base_dist().base_dist.loc) - 3) < 0.1
    with pytest.warns(UserWarning, match="one after the other"):
        runs = for_many_draws(model, guide, (), {})
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        got, _ = next(iter(elbo._get_traces(runs, guide, (), {})))
    assert got.nodes["x"]["log_prob"].shape == (4,)


def test_an_error_that_one_by_one_does_not_cure_is_shown():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(_raises(z), 1.0), obs=torch.tensor(0.0))
        if z > 0:
            pyro.sample("w", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    guide = AutoSpline(model).initialize()
    with pytest.raises(ValueError, match="got _Odd: one draw at a time, please") as caught:
        for_many_draws(model, guide, (), {})
    assert isinstance(caught.value.__cause__.__cause__, _Odd)


@pytest.mark.parametrize(
    "scale", [torch.tensor(2.0), torch.tensor([1.0, 2.0, 3.0, 4.0])], ids=["one", "many"]
)
def test_scales_may_be_tensors(scale):
    def scaled():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 4), poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(X @ beta, 1.0), obs=Y)

    guide = AutoSpline(scaled, base_scale=2.0).initialize()
    elbo = Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    got, _ = next(iter(elbo._get_traces(one_by_one(scaled), guide, (), {})))
    beta = got.nodes["beta"]["value"].reshape(6, 2)
    expected = scale * dist.Normal(beta @ X.T, 1.0).log_prob(Y)
    torch.testing.assert_close(got.nodes["y"]["log_prob"], expected)

    def varies():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=z.exp()):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match="and scale"), pyro.plate("draws", 3, dim=-1):
        one_by_one(varies)()
