"""The flow guides as members of Pyro's autoguide family."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal, half_cauchy_scale, plated
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
    init_to_mean,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import biject_to

from pyro_adaann import AnnealedSMC, AutoPlanar, AutoRealNVP, AutoSpline, AutoZuko, fit
from pyro_adaann.transforms import planar, realnvp
from pyro_adaann.transforms.kernels.coupling import by_layer, couple
from pyro_adaann.transforms.kernels.planar import layer_by_layer
from pyro_adaann.transforms.zuko import import_zuko

pytestmark = pytest.mark.any_device

DATA = torch.tensor([0.3, -1.2, 2.0, 0.7])


def zuko_coupling(latent_dim: int) -> torch.nn.Module:
    flows = import_zuko().flows
    return flows.NSF(latent_dim, transforms=2, passes=2, bins=4, hidden_features=[8, 8])


GUIDES = {
    "planar": lambda model, **kwargs: AutoPlanar(model, 6, **kwargs),
    "planar, no affine": lambda model, **kwargs: AutoPlanar(model, 6, affine=None, **kwargs),
    "realnvp": lambda model, **kwargs: AutoRealNVP(model, 4, [8, 8], **kwargs),
    "spline": lambda model, **kwargs: AutoSpline(model, 2, 5, [8, 8], **kwargs),
    "spline, diagonal": lambda model, **kwargs: AutoSpline(model, 1, 5, [8], affine="diagonal", **kwargs),
    "zuko": lambda model, **kwargs: AutoZuko(model, zuko_coupling, **kwargs),
}


NEEDS_ZUKO = pytest.mark.skipif(importlib.util.find_spec("zuko") is None, reason="needs zuko")


@pytest.fixture(params=[pytest.param(name, marks=[NEEDS_ZUKO] if name == "zuko" else []) for name in GUIDES])
def make_guide(request: pytest.FixtureRequest):
    return GUIDES[request.param]


def train(model, guide, *args, num_steps: int = 5, **elbo_args) -> SVI:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(**elbo_args))
    for _ in range(num_steps):
        svi.step(*args)
    return svi


def all_supports() -> None:
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("positive", dist.Gamma(2.0, 2.0))
    pyro.sample("unit", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("interval", dist.Uniform(-3.0, 5.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(4)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        pyro.sample("local", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")  # what is tested is torch's own
def test_traced_as_a_module(make_guide):
    problem = conjugate_normal()
    guide = make_guide(problem.model).initialize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of Pyro, and of zuko
        traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    assert traced.call()[0].shape == (2,)


def test_tensors_on_the_models_device_whatever_the_default_device(make_guide):
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3, device="cpu"), 1.0).to_event(1))

    if make_guide is GUIDES["zuko"]:
        return  # zuko makes some tensors that no device has been chosen for
    with torch.device("meta"):
        guide = make_guide(model, base_scale=2.0).initialize()
        assert {p.device.type for p in guide.parameters()} == {"cpu"}
        assert guide.median()["z"].device.type == "cpu"
        assert guide.sample_posterior(3)["z"].device.type == "cpu"


@pytest.mark.parametrize(
    ("affine", "names"),
    [
        ("auto", {"parts.1.shift", "parts.1.log_scale", "parts.1.factor"}),
        ("diagonal", {"parts.1.shift", "parts.1.log_scale"}),
        (None, set()),
    ],
)
def test_affine_layer_behind_the_flow(affine, names):
    guide = AutoPlanar(conjugate_normal().model, 3, affine=affine).initialize()
    found = {name.removeprefix("transform.") for name, _ in guide.named_parameters()}
    assert {name for name in found if name.startswith("parts.1")} == names


def test_affine_layer_takes_correlation_and_scale():
    """Of eight seeds the worst correlation was -.99966, the median -.9998."""
    scale_tril = torch.tensor([[100.0, 0.0], [-3.3, 0.05]])  # correlation -.9999

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.tensor([30.0, 1.0]), scale_tril=scale_tril))

    guide = AutoPlanar(model, 2, base_loc=0.0, base_scale=torch.tensor([100.0, 3.0])).initialize()
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99}), elbo)
    for _ in range(600):
        svi.step()
    covariance = guide.sample_posterior(20_000)["z"].T.cov()
    correlation = covariance[0, 1] / covariance.diagonal().prod().sqrt()
    assert correlation.item() < -0.999


@pytest.mark.parametrize("vectorize", [False, True])
def test_any_support_and_plates(make_guide, vectorize):
    guide = make_guide(all_supports)
    train(all_supports, guide, num_particles=3, vectorize_particles=vectorize)
    trace = poutine.trace(all_supports).get_trace()
    draws, medians = guide(), guide.median()
    for name in ["real", "positive", "unit", "interval", "simplex", "cholesky", "local"]:
        site = trace.nodes[name]
        assert draws[name].shape == site["value"].shape, name
        assert medians[name].shape == site["value"].shape, name
        assert site["fn"].support.check(draws[name]).all(), name
        assert site["fn"].support.check(medians[name]).all(), name


def test_density_of_the_guide_is_that_of_its_posterior(make_guide):
    guide = make_guide(plated)
    train(plated, guide, DATA)
    trace = poutine.trace(guide).get_trace(DATA)
    latent = trace.nodes[f"_{guide._pyro_name}_latent"]["value"].detach()
    log_q = guide.get_posterior().log_prob(latent.clone())
    log_jacobian = 0.0
    for site, value in guide._unpack_latent(latent):
        transform = biject_to(site["fn"].support)
        log_jacobian += transform.log_abs_det_jacobian(value, transform(value)).sum()
    assert trace.log_prob_sum().item() == pytest.approx((log_q - log_jacobian).item(), rel=1e-3)


def test_log_prob_at_points_that_are_no_draws(make_guide):
    problem = conjugate_normal()
    guide = make_guide(problem.model).initialize()
    points = 3 * torch.randn(50, 2)
    log_prob = guide.get_posterior().log_prob(points)
    assert log_prob.shape == (50,)
    assert torch.isfinite(log_prob).all()


def test_base_location_and_scale():
    problem = conjugate_normal()
    guide = AutoPlanar(problem.model, 2, base_loc=10.0, base_scale=2.0).initialize()
    base = guide.get_base_dist()
    assert torch.equal(base.mean, torch.full((2,), 10.0))
    assert torch.equal(base.stddev, torch.full((2,), 2.0))
    loc = torch.tensor([1.0, -1.0])
    guide = AutoPlanar(problem.model, 2, base_loc=loc, base_scale=loc.abs()).initialize()
    assert torch.equal(guide.get_base_dist().mean, loc)
    # Near-identity start: the guide is about its base.
    assert guide.get_posterior().sample((2000,)).mean(0).tolist() == pytest.approx([1, -1], abs=0.2)


def test_init_loc_fn_is_the_default_base():
    value = torch.tensor([4.0, -3.0])
    problem = conjugate_normal()
    guide = AutoPlanar(problem.model, 2, init_loc_fn=init_to_value(values={"z": value}))
    assert torch.equal(guide.initialize().get_base_dist().mean, value)
    guide = AutoPlanar(problem.model, 2, init_loc_fn=init_to_mean).initialize()
    assert torch.equal(guide.get_base_dist().mean, torch.zeros(2))


def test_parameters_are_in_place_before_the_first_step(make_guide):
    guide = make_guide(plated)
    assert list(guide.parameters()) == []
    assert guide.initialize(DATA) is guide
    state = guide.state_dict()
    assert {"_base_loc", "_base_scale"} < state.keys()
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    elbo = Trace_ELBO()(plated, guide)
    elbo(DATA).backward()
    optimizer.step()
    changed = [not torch.equal(guide.state_dict()[name], value) for name, value in state.items()]
    assert not all(changed)
    before = guide.state_dict()
    guide.initialize(DATA)
    assert guide.state_dict().keys() == before.keys()


def test_state_dict_round_trip(make_guide):
    guide = make_guide(plated)
    train(plated, guide, DATA)
    pyro.clear_param_store()
    other = make_guide(plated).initialize(DATA)
    other.load_state_dict(guide.state_dict())
    z = torch.randn(5, guide.latent_dim)
    expected = guide.get_posterior().log_prob(z)
    torch.testing.assert_close(other.get_posterior().log_prob(z), expected)


def test_dtype_of_the_model(make_guide):
    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=data)

    guide = make_guide(model)
    train(model, guide, torch.tensor(1.0).double(), num_particles=2, vectorize_particles=True)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert guide(torch.tensor(1.0).double())["z"].dtype == torch.float64
    assert guide.median()["z"].dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_of_the_model(make_guide):
    data = DATA.cuda()

    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(data.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(data)):
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=data)

    guide = make_guide(model)
    train(model, guide, data, num_particles=3, vectorize_particles=True)
    assert {p.device.type for p in guide.parameters()} == {"cuda"}
    assert guide.median()["z"].device.type == "cuda"


def test_quantiles(make_guide):
    guide = make_guide(half_cauchy_scale) if make_guide is GUIDES["planar"] else make_guide(plated)
    train(guide.model, guide, DATA)
    state = torch.get_rng_state()
    quantiles = guide.quantiles([0.05, 0.5, 0.95], DATA)
    assert torch.equal(torch.get_rng_state(), state)
    draws = guide.sample_posterior(4000, DATA)["scale"]
    # Shares of draws below the quantiles; the error of a share is at most 0.8 %, five of those allowed.
    for level, value in zip([0.05, 0.5, 0.95], quantiles["scale"], strict=True):
        assert (draws < value).float().mean().item() == pytest.approx(level, abs=0.04)
    # Between two points of the net, one interpolates before the constraint and the other after it.
    torch.testing.assert_close(guide.median(DATA)["scale"], quantiles["scale"][1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="Expected quantiles in"):
        guide.quantiles([1.5], DATA)


class Below(dist.TransformedDistribution):
    """Numbers below 3, whose bijection from the real line decreases."""

    support = dist.constraints.less_than(3.0)

    def __init__(self) -> None:
        super().__init__(dist.LogNormal(0.0, 0.5), [dist.transforms.AffineTransform(3.0, -2.0)])


def test_quantiles_are_those_of_the_values_whatever_the_constraint():
    def model() -> None:
        pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 4.0])))
        pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
        pyro.sample("upper", Below())

    guide = AutoPlanar(model, 4)
    train(model, guide, num_steps=20)
    levels = [0.05, 0.5, 0.95]
    quantiles = guide.quantiles(levels)
    draws = guide.sample_posterior(4000)
    for name, value in quantiles.items():
        assert value.shape == (3, *draws[name].shape[1:])
        assert (value.diff(dim=0) >= 0).all()
        varies = draws[name].std(0) > 0  # a Cholesky factor has constant zeros
        for level, own in zip(levels, value, strict=True):
            share = (draws[name] < own).float().mean(0)[varies]
            # The error of a share is at most .8 %, five of those and .5 % of the net allowed.
            assert (share - level).abs().max() < 0.045, name
    # The median satisfies the constraints.
    torch.testing.assert_close(guide.median()["simplex"].sum(-1), torch.tensor(1.0))
    assert (guide.median()["upper"] < 3).all()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(make_guide, parallel):
    guide = make_guide(all_supports)
    train(all_supports, guide)
    samples = Predictive(all_supports, guide=guide, num_samples=7, parallel=parallel)()
    assert samples["local"].shape == (7, 2, 3, 2)
    assert samples["unit"].shape[0] == 7
    assert samples["unit"].numel() == 14


def test_sample_posterior_and_log_prob_in_the_models_coordinates(make_guide):
    guide = make_guide(all_supports)
    train(all_supports, guide)
    draws = guide.sample_posterior(25, batch_size=10)
    for name, value in guide().items():
        assert draws[name].shape == (25, *value.shape), name
    log_prob = guide.log_prob(draws)
    assert log_prob.shape == (25,)
    # One draw at a time, as the trace of the guide scores it.
    trace = poutine.trace(guide).get_trace()
    draw = {name: trace.nodes[name]["value"].detach().unsqueeze(0) for name in draws}
    assert guide.log_prob(draw).item() == pytest.approx(trace.log_prob_sum().item(), rel=1e-3)
    with pytest.raises(ValueError, match="got none of positive"):
        guide.log_prob({name: value for name, value in draws.items() if name != "positive"})


def test_log_prob_integrates_to_one_over_a_constrained_variable():
    guide = AutoPlanar(half_cauchy_scale, 6)
    train(half_cauchy_scale, guide, DATA, num_steps=100)
    grid = torch.logspace(-6, 6, 20_001, dtype=torch.float64, base=10).float()
    with torch.no_grad():
        density = guide.log_prob({"scale": grid}).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=2e-3)


class PlainPlanar:
    """The planar stack layer by layer, with autograd's gradient."""

    apply = staticmethod(layer_by_layer)


class PlainCoupling:
    """The coupling stack layer by layer, with autograd's gradient."""

    @staticmethod
    def apply(copied: Tensor, mapped: Tensor, num_networks: int, *matrices: Tensor):
        return couple(copied, mapped, by_layer(matrices, num_networks))


def test_same_losses_as_the_plain_formulation(make_guide, monkeypatch):
    problem = conjugate_normal()

    def losses() -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make_guide(problem.model)
        elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
        svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": 0.005}), elbo)
        return [svi.step() for _ in range(20)]

    fast = losses()
    monkeypatch.setattr(planar, "PlanarFunction", PlainPlanar)
    monkeypatch.setattr(realnvp, "CouplingFunction", PlainCoupling)
    assert fast == pytest.approx(losses(), rel=1e-5)


def test_neutra_density_and_gradient(make_guide):
    """In the guide's coordinates the density is that of the model at the image, times the Jacobian's."""
    problem = conjugate_normal()
    guide = make_guide(problem.model)
    train(problem.model, guide, num_particles=10, vectorize_particles=True)
    model = poutine.reparam(problem.model, config=lambda _: NeuTraReparam(guide))
    for _ in range(3):
        x = (2 * torch.randn(2)).requires_grad_()
        actual = poutine.trace(poutine.condition(model, {"z_shared_latent": x})).get_trace().log_prob_sum()
        same = x.detach().clone().requires_grad_()
        z, log_det = guide.transform.forward_and_log_det(same)
        expected = problem.log_prior(z) + problem.log_likelihood(z) + log_det
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        gradients = (torch.autograd.grad(actual, x), torch.autograd.grad(expected, same))
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_neutra_chain():
    problem = conjugate_normal()
    guide = GUIDES["realnvp"](problem.model)
    train(problem.model, guide, num_steps=50, num_particles=10, vectorize_particles=True)
    neutra = NeuTraReparam(guide)
    model = poutine.reparam(problem.model, config=lambda _: neutra)
    mcmc = MCMC(NUTS(model), num_samples=100, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    z = neutra.transform_sample(mcmc.get_samples()["z_shared_latent"])["z"].detach()
    mean, sd = problem.tempered("joint", 1.0, base=(0.0, 1.0))
    # 100 draws: a mean is uncertain by about 0.14 sd, an sd by 10 %; four of those, once in 4,000 seeds.
    assert z.mean(0).tolist() == pytest.approx(mean.tolist(), abs=0.6 * sd)
    assert z.std(0).tolist() == pytest.approx([sd] * 2, rel=0.4)


def test_beside_discrete_sites_in_a_guide_list(make_guide):
    def model(data: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(slope.sum(-1) + k, 1.0).expand([4]).to_event(1), obs=data)

    guide = AutoGuideList(model)
    guide.append(make_guide(poutine.block(model, expose=["slope"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    assert set(guide(DATA)) == {"slope", "k"}
    twin = copy.deepcopy(guide)
    assert set(twin(DATA)) == {"slope", "k"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_copies_after_steps(make_guide, duplicate):
    guide = make_guide(plated)
    svi = train(plated, guide, DATA)
    model = guide.model
    twin = duplicate(guide)
    assert guide.model is model
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    expected = guide(DATA)
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    actual = twin(DATA)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    # A copy shares no parameter: training one leaves the other alone.
    before = copy.deepcopy(twin.state_dict())
    pyro.clear_param_store()
    svi.step(DATA)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, before[name])
    median = twin.median(DATA)
    assert median.keys() == expected.keys()


def test_deep_copy_keeps_the_model_and_goes_on_training(make_guide):
    guide = make_guide(plated)
    train(plated, guide, DATA)
    twin = copy.deepcopy(guide)
    assert twin.model is guide.model
    pyro.clear_param_store()
    train(plated, twin, DATA)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")  # Pyro's JIT uses it
@pytest.mark.parametrize("vectorize", [False, True])
def test_jit_loss_follows_the_parameters(make_guide, vectorize):
    if make_guide is GUIDES["zuko"]:
        pytest.skip("torch's compiler takes minutes for zuko's passes")
    # Bound once: Pyro traces again for every new object, and a bound method is a new one at each use.
    model = conjugate_normal().model
    guide = make_guide(model)
    options = {
        "num_particles": 4000 if vectorize else 2,
        "vectorize_particles": vectorize,
        "max_plate_nesting": 1,
    }
    jit = JitTrace_ELBO(**options, ignore_jit_warnings=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), jit)
    for seed in range(4):
        svi.step()
        pyro.set_rng_seed(seed)
        compiled = jit.differentiable_loss(model, guide).item()
        pyro.set_rng_seed(seed)
        plain = Trace_ELBO(**options).differentiable_loss(model, guide).item()
        assert compiled == pytest.approx(plain, rel=1e-4)


def test_first_call_inside_a_particle_plate(make_guide):
    guide = make_guide(plated)
    train(plated, guide, DATA, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    assert guide.latent_dim == 1 + 2 + 2


def test_vectorized_particles_are_single_draws():
    problem = conjugate_normal()
    guide = AutoPlanar(problem.model, 5, base_scale=2.0).initialize()
    pyro.set_rng_seed(0)
    elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True)
    vectorized = elbo.loss(problem.model, guide)
    losses = torch.tensor([Trace_ELBO().loss(problem.model, guide) for _ in range(1000)])
    # Five standard errors of the looped mean: fails once in a million seeds.
    bound = 5 * losses.std() / 1000**0.5
    assert abs(vectorized - losses.mean()) < bound


def improper() -> None:
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))


def covariance() -> None:
    pyro.sample("z", dist.Wishart(40.0, torch.eye(2)))


@pytest.mark.filterwarnings("ignore:Singular sample")  # of torch's Wishart
@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: AutoPlanar(plated, 0), ValueError, "Expected `num_transforms`.*got 0"),
        (lambda: AutoRealNVP(plated, 2, []), ValueError, "hidden_dims"),
        (lambda: AutoRealNVP(plated, 2, [0]), ValueError, "hidden_dims.*got 0"),
        (lambda: AutoRealNVP(half_cauchy_scale, 2)(DATA), ValueError, "got 1. Use AutoPlanar"),
        (lambda: AutoPlanar(plated, 2, base_scale=-1.0)(DATA), ValueError, "`base_scale` > 0"),
        (lambda: AutoPlanar(plated, 2, base_loc=torch.zeros(3))(DATA), ValueError, "\\(5,\\)"),
        (lambda: AutoPlanar(plated, 2, affine="full"), ValueError, 'Expected `affine` to be "auto"'),
        (lambda: AutoSpline(plated, 0), ValueError, "Expected `num_transforms`.*got 0"),
        (lambda: AutoSpline(plated, num_bins=0), ValueError, "Expected `num_bins`.*got 0"),
        (lambda: AutoSpline(plated, hidden_dims=[]), ValueError, "hidden_dims"),
        (lambda: AutoPlanar(improper, 2)(), NotImplementedError, "mask\\(False\\)"),
        (lambda: AutoPlanar(covariance, 2)(), NotImplementedError, "LKJCholesky"),
        (lambda: fit(covariance, progress_bar=False), NotImplementedError, "LKJCholesky"),
        (lambda: AnnealedSMC(covariance).run(), NotImplementedError, "LKJCholesky"),
        (lambda: fit(improper, progress_bar=False), NotImplementedError, "mask\\(False\\)"),
        (lambda: AnnealedSMC(improper).run(), NotImplementedError, "mask\\(False\\)"),
        (lambda: AutoPlanar(lambda: None, 2)(), RuntimeError, "no latent variables"),
    ],
)
def test_bad_arguments_are_named(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_flat_prior_as_the_message_says():
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 10.0).mask(False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    train(model, AutoPlanar(model, 3), num_particles=4, vectorize_particles=True)


def test_two_guides_of_one_family_share_nothing_but_a_name_prefix():
    # Pyro's own rule: one parameter store, so clear it between two fits with guides of one class.
    guide = AutoNormal(plated)
    train(plated, guide, DATA)
    train(plated, AutoPlanar(plated, 3), DATA)
    names = set(pyro.get_param_store())
    assert {name.split(".")[0] for name in names} == {"AutoNormal", "AutoPlanar"}


def test_a_latent_site_in_a_loop_over_a_plate_is_refused_with_what_to_write():
    def model():
        for i in pyro.plate("loop", 3):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"one site for all, or a loop over `range\(...\)`"):
        AutoPlanar(model).initialize()
    with pytest.raises(ValueError, match="AnnealedSMC does not take"):
        AnnealedSMC(model, num_particles=32).run(progress_bar=False)
