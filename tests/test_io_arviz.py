"""Export to ArviZ, whichever of its two interfaces is installed."""

from __future__ import annotations

import math

import numpy as np
import problems
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    LinearSchedule,
    SequenceSchedule,
    __version__,
    diagnose,
    natural_svi,
)
from pyro_adaann.export.arviz import to_arviz

try:
    import arviz as az

    is_old = int(az.__version__.split(".")[0]) < 1
except ImportError:
    is_old = False

SAMPLE_DIMS = ("chain", "draw")
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

pytestmark = pytest.mark.filterwarnings(
    # ArviZ 0.23 and the libraries below it, not in our hands.
    "ignore::DeprecationWarning:(arviz|xarray|netCDF4|h5netcdf|h5py).*",
    "ignore:numpy.ndarray size changed:RuntimeWarning",
    # Guides without training and diagnoses of a few draws.
    "ignore:The verdict on the fit is (UNRELIABLE|OUT OF REACH):UserWarning",
)


def schools(y: torch.Tensor) -> None:
    """Eight schools, non-centered (Rubin 1981)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=y)


def fit_schools(num_final_steps: int = 300, num_steps: int | None = None) -> AdaAnnSVI:
    svi = AdaAnnSVI(
        schools,
        AutoPlanar(schools, num_transforms=8),
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(num_particles=20, vectorize_particles=True),
        schedule=AdaAnnSchedule(0.5),
        num_initial_steps=50,
        num_final_steps=num_final_steps,
    )
    if num_steps is None:
        svi.run(EFFECTS, progress_bar=False)
    else:
        for _ in range(num_steps):
            svi.step(EFFECTS)
    return svi


def dims_of(data, group: str, name: str) -> tuple[str, ...]:
    dims = data[group][name].dims
    if group in ("observed_data", "constant_data"):
        return dims
    assert dims[: len(SAMPLE_DIMS)] == SAMPLE_DIMS
    return dims[len(SAMPLE_DIMS) :]


def draws_of(data, group: str, name: str) -> np.ndarray:
    return data[group][name].values[0]


def names_in(data, group: str) -> set[str]:
    return set(data[group].data_vars)


def groups_in(data) -> set[str]:
    return set(data.groups()) if is_old else {name.lstrip("/") for name in data.groups} - {""}


def test_groups_names_dims_and_coords():
    svi = fit_schools()
    letters = list("ABCDEFGH")
    data = to_arviz(
        svi,
        EFFECTS,
        num_samples=120,
        weighted=False,
        batch_size=50,
        coords={"schools": letters},
        dims={"sigma": ["schools"]},
        constant_data={"sigma": ERRORS},
        prior=True,
    )
    assert groups_in(data) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "prior",
        "prior_predictive",
        "observed_data",
        "constant_data",
        "annealing",
    }
    for group in ("posterior", "prior"):
        assert names_in(data, group) == {"mu", "tau", "eta", "theta"}
        assert dims_of(data, group, "mu") == ()
        assert dims_of(data, group, "theta") == ("schools",)
        assert len(draws_of(data, group, "eta")) == 120
    for group in ("posterior_predictive", "prior_predictive", "log_likelihood", "observed_data"):
        assert names_in(data, group) == {"y"}
        assert dims_of(data, group, "y") == ("schools",)
    assert dims_of(data, "constant_data", "sigma") == ("schools",)
    assert list(data["posterior"]["eta"].coords["schools"].values) == letters
    np.testing.assert_array_equal(data["observed_data"]["y"].values, EFFECTS.numpy())

    posterior = {name: draws_of(data, "posterior", name) for name in ("mu", "tau", "eta", "theta")}
    theta = posterior["mu"][:, None] + posterior["tau"][:, None] * posterior["eta"]
    np.testing.assert_allclose(posterior["theta"], theta, rtol=1e-4, atol=1e-4)
    log_likelihood = dist.Normal(torch.tensor(theta), ERRORS).log_prob(EFFECTS)
    np.testing.assert_allclose(draws_of(data, "log_likelihood", "y"), log_likelihood, rtol=1e-3, atol=1e-4)


def test_sample_stats_are_the_log_densities():
    problem = problems.conjugate_normal(2)
    data = to_arviz((problem.model, AutoNormal(problem.model)), num_samples=50, weighted=False)
    z = torch.tensor(draws_of(data, "posterior", "z"))
    log_p, log_q, log_weight = (
        torch.tensor(draws_of(data, "sample_stats", n)) for n in ("log_p", "log_q", "log_weight")
    )
    expected = (problem.log_prior(z) + problem.log_likelihood(z)).double()
    torch.testing.assert_close(log_p, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(log_weight, log_p - log_q)
    assert "annealing" not in groups_in(data)


def test_predictive_draws_are_of_the_model():
    problem = problems.conjugate_normal(1)
    data = to_arviz((problem.model, AutoNormal(problem.model)), num_samples=4000, prior=True)
    residual = draws_of(data, "posterior_predictive", "x") - draws_of(data, "posterior", "z")[:, None]
    # 12,000 normal draws: a relative standard error of the sd of 0.0065.
    assert residual.std() == pytest.approx(problem.noise_sd, rel=0.04)
    sd = math.hypot(problem.prior_sd, problem.noise_sd)
    assert draws_of(data, "prior_predictive", "x").std() == pytest.approx(sd, rel=0.06)


def test_weighted_draws_are_of_the_posterior():
    problem = problems.conjugate_normal(1)
    mean, sd = problem.tempered("joint", 1.0, (0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(mean + 0.5 * sd, 1.5 * sd).to_event(1))

    data = to_arviz((problem.model, guide), num_samples=20_000, weighted=True, posterior_predictive=False)
    z = draws_of(data, "posterior", "z")
    # Standard errors are about 0.01 sd.
    assert z.mean() == pytest.approx(float(mean), abs=0.05 * sd)
    assert z.std() == pytest.approx(sd, rel=0.05)
    assert "sample_stats" not in groups_in(data)
    likelihood = dist.Normal(torch.tensor(z)[:, None], problem.noise_sd).log_prob(problem.data)
    np.testing.assert_allclose(
        draws_of(data, "log_likelihood", "x"), likelihood.sum(-1), rtol=1e-4, atol=1e-4
    )


def test_plates_vector_sites_and_user_dims():
    rows = torch.linspace(-1.0, 2.0, 5)
    guide = AutoNormal(problems.plated)
    data = to_arviz((problems.plated, guide), rows, num_samples=30, dims={"slope": ["feature"]})
    assert names_in(data, "posterior") == {"scale", "slope", "weights"}
    assert dims_of(data, "posterior", "scale") == ()
    assert dims_of(data, "posterior", "slope") == ("feature",)
    assert dims_of(data, "posterior", "weights") == ("weights_dim_0",)
    assert draws_of(data, "posterior", "weights").sum(-1) == pytest.approx(1.0, abs=1e-5)
    assert dims_of(data, "log_likelihood", "x") == ("rows",)
    with pytest.raises(ValueError, match="Expected `dims` of 'slope' to name 1 dimensions"):
        to_arviz((problems.plated, guide), rows, num_samples=30, dims={"slope": ["a", "b"]})


def nested(y: torch.Tensor) -> None:
    """Nested plates and a site of vectors in them."""
    with pyro.plate("group", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("item", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(a.unsqueeze(-1), torch.ones(2)).to_event(1))
            pyro.sample("y", dist.Normal(b, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("vectorize", [True, False])
def test_nested_plates(vectorize):
    y = torch.arange(24.0).reshape(3, 4, 2)
    data = to_arviz((nested, AutoNormal(nested)), y, num_samples=30, vectorize=vectorize, prior=True)
    assert dims_of(data, "posterior", "a") == ("group", "a_dim_1")
    assert dims_of(data, "posterior", "b") == ("group", "item", "b_dim_2")
    for group in ("prior_predictive", "posterior_predictive", "observed_data"):
        assert dims_of(data, group, "y") == ("group", "item", "y_dim_2")
    assert dims_of(data, "log_likelihood", "y") == ("group", "item")
    b = torch.tensor(draws_of(data, "posterior", "b"))
    expected = dist.Normal(b, 1.0).log_prob(y).sum(-1)
    np.testing.assert_allclose(draws_of(data, "log_likelihood", "y"), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("vectorize", [True, False])
def test_enumerated_sites_are_summed_out_of_the_log_likelihood(vectorize):
    x = torch.linspace(-2.0, 3.0, 6)
    guide = AutoNormal(poutine.block(problems.mixture, hide=["k"]))
    data = to_arviz((problems.mixture, guide), x, num_samples=40, vectorize=vectorize, prior=True)
    assert names_in(data, "posterior") == {"locs"}
    assert names_in(data, "prior") == {"locs", "k"}
    assert dims_of(data, "posterior_predictive", "x") == ("data",)
    locs = torch.tensor(draws_of(data, "posterior", "locs"))
    joint = problems.mixture_log_joint(locs, x) - dist.Normal(0.0, 3.0).log_prob(locs).sum(-1)
    np.testing.assert_allclose(draws_of(data, "log_likelihood", "x").sum(-1), joint, rtol=1e-4, atol=1e-4)


def test_a_shared_enumerated_site_has_no_pointwise_log_likelihood():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + k, 1.0), obs=x)

    pair = model, AutoNormal(poutine.block(model, hide=["k"]))
    x = torch.linspace(-1.0, 1.0, 4)
    with pytest.raises(ValueError, match="Pass `log_likelihood=False`"):
        to_arviz(pair, x, num_samples=30)
    data = to_arviz(pair, x, num_samples=30, log_likelihood=False)
    assert "log_likelihood" not in groups_in(data)


def test_a_subsampled_plate_is_refused():
    rows = torch.linspace(-1.0, 2.0, 5)
    with pytest.raises(ValueError, match="got 2 of 5 in plate 'rows'"):
        to_arviz((problems.plated, AutoNormal(problems.plated)), rows, subsample_size=2)


def test_a_model_of_factors_alone_has_no_data():
    data = to_arviz((problems.bimodal, AutoNormal(problems.bimodal)), num_samples=30, weighted=False)
    assert groups_in(data) == {"posterior", "sample_stats"}


def test_settings_and_history():
    svi = fit_schools(num_final_steps=7)
    data = to_arviz(svi, EFFECTS, num_samples=100)
    assert data.attrs["inference_library"] == "pyro_adaann"
    assert data.attrs["inference_library_version"] == __version__
    assert data.attrs["guide"] == "AutoPlanar"
    assert data.attrs["path"] == "joint"
    assert "tolerance=0.5" in data.attrs["schedule"]
    assert data.attrs["inverse_temperature"] == 1.0
    assert data.attrs["is_done"] == 1
    assert math.isfinite(data.attrs["pareto_k_hat"])
    annealing = data["annealing"]
    assert annealing["inverse_temperature"].dims == ("chain", "stage")
    assert annealing["loss"].dims == ("chain", "step")
    assert annealing["inverse_temperature"].values[0].tolist() == svi.history.inverse_temperatures
    assert annealing["loss"].values[0].tolist() == svi.history.losses
    assert int(annealing["num_steps"].sum()) == svi.history.num_steps


def test_a_fit_that_has_not_reached_1_warns_and_says_so():
    svi = fit_schools(num_steps=3)
    with pytest.warns(UserWarning, match="stands at inverse temperature 0.01: the draws are of a tempered"):
        data = to_arviz(svi, EFFECTS, num_samples=50)
    assert data.attrs["inverse_temperature"] == 0.01


def test_sample_dims_are_checked():
    pair = problems.bimodal, AutoNormal(problems.bimodal)
    data = to_arviz(pair, num_samples=30)
    assert data["posterior"]["z"].dims == ("chain", "draw")
    assert data["posterior"]["z"].shape == (1, 30)
    if not is_old:
        data = to_arviz(pair, num_samples=30, sample_dims=["sample"])
        assert data["posterior"]["z"].dims == ("sample",)
    with pytest.raises(ValueError, match="Expected `sample_dims` to be"):
        to_arviz(pair, num_samples=30, sample_dims=["draw"])


def test_plain_svi():
    problem = problems.conjugate_normal(1)
    svi = SVI(problem.model, AutoNormal(problem.model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step()
    data = to_arviz(svi, num_samples=30)
    assert data.attrs["inverse_temperature"] == 1.0
    assert data.attrs["guide"] == "AutoNormal"


def test_a_guide_that_chooses_its_number_of_layers_can_be_written(tmp_path):
    svi = natural_svi(schools, num_particles=20, num_final_steps=1, schedule=LinearSchedule(2))
    svi.run(EFFECTS, progress_bar=False)
    to_arviz(svi, EFFECTS, num_samples=50, weighted=False).to_netcdf(tmp_path / "spline.nc")


def test_netcdf_round_trip(tmp_path):
    data = to_arviz(fit_schools(num_final_steps=5), EFFECTS, num_samples=40, prior=True)
    path = str(tmp_path / "fit.nc")
    data.to_netcdf(path)
    if is_old:
        back = az.from_netcdf(path)
    else:
        import xarray

        back = xarray.open_datatree(path)
    assert groups_in(back) == groups_in(data)
    np.testing.assert_array_equal(draws_of(back, "posterior", "eta"), draws_of(data, "posterior", "eta"))
    np.testing.assert_array_equal(back["annealing"]["loss"].values, data["annealing"]["loss"].values)
    assert back.attrs["schedule"] == data.attrs["schedule"]
    assert back.attrs["pareto_k_hat"] == pytest.approx(data.attrs["pareto_k_hat"])


@pytest.mark.skipif(not is_old, reason="of ArviZ 0.x")
# 400 draws of a short fit: leave-one-out is to run, not to be precise.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
def test_arviz_0_reads_it():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    svi = fit_schools()
    data = to_arviz(svi, EFFECTS, num_samples=400)
    table = az.summary(data, var_names=["mu", "tau"], kind="stats")
    assert list(table.index) == ["mu", "tau"]
    assert math.isfinite(az.loo(data).elpd_loo)
    az.plot_pair(data, var_names=["mu", "tau"])
    az.plot_ppc(data, num_pp_samples=20, random_seed=0)
    az.plot_trace(data, var_names=["mu"])
    plt.close("all")


@pytest.mark.skipif(is_old, reason="of ArviZ 1.x")
# A short fit: leave-one-out is to run, not to be precise. A single chain has no r-hat.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
def test_arviz_1_reads_it():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    svi = fit_schools()
    data = to_arviz(svi, EFFECTS, num_samples=1000, weighted=False)
    table = az.summary(data, var_names=["mu", "tau"])
    assert list(table.index) == ["mu", "tau"]
    for function in (az.ess, az.rhat, az.hdi):
        assert set(function(data).data_vars) == {"mu", "tau", "eta", "theta"}
    assert az.loo_pit(data)["y"].shape == (8,)
    stats = data["sample_stats"]
    corrected = az.loo_approximate_posterior(data, log_p=stats["log_p"], log_q=stats["log_q"])
    assert corrected.approx_posterior
    assert math.isfinite(corrected.elpd)
    assert math.isfinite(az.loo(data).elpd)
    az.plot_ppc_dist(data)
    plt.close("all")


# ArviZ 0.23 leaves to xarray how stages of unequal number are put beside each other.
@pytest.mark.filterwarnings("ignore:In a future version of xarray:FutureWarning")
def test_several_fits_are_chains_of_one_data_set():
    fits = []
    for seed, num_final_steps in ((0, 5), (1, 8)):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        fits.append(to_arviz(fit_schools(num_final_steps), EFFECTS, num_samples=100, weighted=False))
    if is_old:
        both = az.concat(*fits, dim="chain", reset_dim=True)
    else:
        import xarray

        rules = {"data_vars": "minimal", "coords": "minimal", "compat": "override", "join": "outer"}
        both = xarray.concat(fits, "chain", **rules)
    assert both["posterior"]["theta"].shape == (2, 100, 8)
    assert both["observed_data"]["y"].shape == (8,)
    for chain, data in enumerate(fits):
        np.testing.assert_array_equal(
            both["posterior"]["mu"].values[chain], draws_of(data, "posterior", "mu")
        )
        own = data["annealing"]["loss"].values[0]
        losses = both["annealing"]["loss"].values[chain]
        np.testing.assert_array_equal(losses[: len(own)], own)
        assert np.isnan(losses[len(own) :]).all()
    assert np.isfinite(az.rhat(both)["mu"].values)


def shifted_guide(mean: torch.Tensor, sd: float):
    return lambda: pyro.sample("z", dist.Normal(mean + 0.5 * sd, 1.5 * sd).to_event(1))


def test_draws_are_weighted_where_the_verdict_asks_for_it():
    problem = problems.conjugate_normal(1)
    mean, sd = problem.tempered("joint", 1.0, (0.0, 1.0))
    pair = problem.model, shifted_guide(mean, sd)
    data = to_arviz(pair, num_samples=20_000, log_likelihood=False, posterior_predictive=False)
    assert data.attrs["verdict"] == "USABLE WITH WEIGHTS"
    assert data.attrs["weighted"] == 1
    # As of weighted draws above; without weights the mean is 0.5 sd off.
    assert draws_of(data, "posterior", "z").mean() == pytest.approx(float(mean), abs=0.05 * sd)
    exact = problem.model, lambda: pyro.sample("z", dist.Normal(mean, sd).to_event(1))
    data = to_arviz(exact, num_samples=500)
    assert (data.attrs["verdict"], data.attrs["weighted"]) == ("GOOD", 0)
    assert "sample_stats" in groups_in(data)


def test_draws_that_stand_for_nothing_are_not_exported_silently():
    problem = problems.conjugate_normal(1)
    mean, sd = problem.tempered("joint", 1.0, (0.0, 1.0))
    narrow = problem.model, lambda: pyro.sample("z", dist.Normal(mean, 0.2 * sd).to_event(1))
    with pytest.warns(UserWarning, match="The verdict on the fit is UNRELIABLE"):
        data = to_arviz(narrow, num_samples=1000)
    assert data.attrs["verdict"] == "UNRELIABLE"


def test_a_diagnosis_is_not_made_twice():
    runs = 0

    def model() -> None:
        nonlocal runs
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        runs += z.numel()

    pair = model, lambda: pyro.sample("z", dist.Normal(0.0, 1.3))
    diagnosis = diagnose(pair, num_samples=5000)
    runs = 0
    data = to_arviz(pair, num_samples=100, diagnosis=diagnosis)
    assert runs < 150
    assert data.attrs["verdict"] == diagnosis.level.headline == "USABLE WITH WEIGHTS"
    assert data.attrs["weighted"] == 1


@pytest.mark.slow
@pytest.mark.skipif(not is_old, reason="from_pyro is of ArviZ 0.x")
@pytest.mark.filterwarnings("ignore")  # of NUTS, and of leave-one-out where a k is above 0.7
def test_leave_one_out_of_eight_schools_is_that_of_nuts():
    mcmc = MCMC(NUTS(schools), num_samples=1000, warmup_steps=500, disable_progbar=True)
    mcmc.run(EFFECTS)
    posterior = mcmc.get_samples()
    theta = posterior["mu"][:, None] + posterior["tau"][:, None] * posterior["eta"]
    log_likelihood = dist.Normal(theta, ERRORS).log_prob(EFFECTS)
    reference = az.from_dict(
        posterior={"mu": posterior["mu"][None].numpy()},
        log_likelihood={"y": log_likelihood[None].numpy()},
    )
    expected = az.loo(reference)
    svi = fit_schools(num_final_steps=2000)
    got = az.loo(to_arviz(svi, EFFECTS, num_samples=4000, weighted=True))
    print(got, expected)
    # Far less than the 2 standard errors of either: those are of the choice of schools.
    assert got.elpd_loo == pytest.approx(expected.elpd_loo, abs=0.3)
    assert got.se == pytest.approx(expected.se, abs=0.3)


def test_an_annealed_sequence_is_exported_with_its_schedule():
    problem = problems.conjugate_normal(1)
    svi = AdaAnnSVI(
        problem.model,
        AutoNormal(problem.model),
        pyro.optim.Adam({"lr": 0.1}),
        Trace_ELBO(),
        schedule=SequenceSchedule([0.5, 1.0]),
        num_initial_steps=2,
        num_final_steps=2,
    )
    svi.run(progress_bar=False)
    data = to_arviz(svi, num_samples=30)
    assert np.isnan(data["annealing"]["log_factor_sd"].values).all()
