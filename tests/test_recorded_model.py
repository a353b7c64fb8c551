"""Model and guide recorded as operations: the same numbers, or a run and a warning that says why."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam

from pyro_adaann import AdaAnnSVI, AutoPlanar, AutoSpline, SequenceSchedule, TraceMixedKL_ELBO, natural_svi
from pyro_adaann.guide_status import expects_tempered
from pyro_adaann.objectives import model_record
from pyro_adaann.objectives.operations import CannotRecordError, recorded

#: In double precision, in which rounding does not grow to what a test sees.
X = torch.linspace(-2.0, 2.0, 12).double()
Y = 0.5 + 1.5 * X + 0.3 * torch.sin(9.0 * X)


def model(y=Y, factor=1.0):
    """Sites of several kinds, a plate, a vector, a factor, a mask, a scale and a function of sites."""
    a = pyro.sample("a", dist.Normal(X.new_tensor(0.0), 3.0))
    b = pyro.sample("b", dist.Normal(X.new_zeros(2), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfCauchy(X.new_tensor(1.0)))
    share = pyro.sample("share", dist.Beta(X.new_tensor(2.0), X.new_tensor(3.0)))
    pyro.factor("soft", -factor * (share - 0.5) ** 2)
    pyro.deterministic("twice", 2 * a)
    with pyro.plate("data", 12), poutine.mask(mask=X > -1.9), poutine.scale(scale=0.7):
        pyro.sample("y", dist.Normal(a + b[..., 0] * X + b[..., 1] * X**2, scale), obs=y)


def adam(guide, loss=Trace_ELBO, model=model, **kwargs):
    elbo = loss(num_particles=30, vectorize_particles=True, max_plate_nesting=1)
    settings = {
        "schedule": SequenceSchedule([0.3, 0.6, 1.0]),
        "num_initial_steps": 6,
        "num_steps_per_stage": 4,
    }
    return AdaAnnSVI(model, guide, Adam({"lr": 0.01}), elbo, **{**settings, **kwargs})


def losses(make, num_steps=30, **kwargs):
    """Return the losses of a fit, and the fit."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make()
    found = []
    while len(found) < num_steps and not svi.is_done:
        found.append(svi.step(**kwargs))
    return torch.tensor(found), svi


def take_steps(svi, num_steps, kwargs=dict):
    return [svi.step(**kwargs()) for _ in range(num_steps)]


def take_growing_steps(svi, elbo):
    for elbo.num_particles in range(2, 9):
        svi.step()


def num_uses(svi):
    return sum(record._num_uses for record in svi._fit.objective.recorder._records.values())


def is_used(svi):
    """Whether steps have been taken by a record."""
    recorder = svi._fit.objective.recorder
    return not recorder.reason and num_uses(svi) > 3


def check_equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "path", "loss"),
    [
        (AutoPlanar, "joint", Trace_ELBO),
        (AutoPlanar, "bridge", TraceMixedKL_ELBO),
        (AutoSpline, "likelihood", Trace_ELBO),
        (AutoMultivariateNormal, "bridge", Trace_ELBO),
        (AutoPlanar, "likelihood", RenyiELBO),
        (AutoMultivariateNormal, "likelihood", TraceMixedKL_ELBO),
    ],
)
def test_steps_are_those_of_a_run(kind, path, loss):
    """Through stages and at 1."""
    plain, _ = losses(lambda: adam(kind(model), loss, path=path))
    got, svi = losses(lambda: adam(kind(model), loss, path=path, record_model=True))
    assert is_used(svi)
    assert svi.inverse_temperature == 1
    check_equal(got, plain)


def test_kl_warmup_is_that_of_a_run():
    plain, _ = losses(lambda: adam(AutoPlanar(model), path="kl_warmup"))
    got, svi = losses(lambda: adam(AutoPlanar(model), path="kl_warmup", record_model=True))
    assert is_used(svi)
    check_equal(got, plain)


@pytest.mark.parametrize("kind", [AutoPlanar, AutoSpline])
def test_natural_steps_are_those_of_a_run(kind):
    def make(record_model):
        return natural_svi(model, kind(model), num_particles=100, record_model=record_model)

    plain, other = losses(lambda: make(False), 20)
    got, svi = losses(lambda: make(True), 20)
    assert is_used(svi)
    assert svi.inverse_temperature == other.inverse_temperature
    check_equal(got, plain)


def test_a_run_to_the_end_is_the_same():
    """With schedule, ladder and stage rule, which read the log factors."""
    found = []
    for record_model in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = natural_svi(
            model, AutoSpline(model), num_particles=80, num_final_steps=4, record_model=record_model
        )
        found.append(svi.run(progress_bar=False))
    assert is_used(svi)
    check_equal(torch.tensor(found[1].losses), torch.tensor(found[0].losses))
    assert [s.inverse_temperature for s in found[0].stages] == pytest.approx(
        [s.inverse_temperature for s in found[1].stages], rel=1e-5
    )


def test_single_precision():
    def single():
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(z), obs=torch.tensor(3.0))

    plain, _ = losses(lambda: adam(AutoPlanar(single), model=single))
    got, svi = losses(lambda: adam(AutoPlanar(single), model=single, record_model=True))
    assert is_used(svi)
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-3)


def test_a_single_particle():
    def make(**kwargs):
        return AdaAnnSVI(model, AutoPlanar(model), Adam({"lr": 0.01}), Trace_ELBO(), **kwargs)

    plain, _ = losses(make)
    got, svi = losses(lambda: make(record_model=True))
    assert is_used(svi)
    check_equal(got, plain)


@pytest.mark.parametrize("path", ["joint", "likelihood", "bridge"])
def test_the_sites_of_a_record_are_those_of_a_run(path):
    """All that is read of a site: value, scale, and log density with its sum and its parts."""
    pyro.clear_param_store()
    svi = adam(AutoPlanar(model), path=path, record_model=True)
    for _ in range(3):
        svi.step()
    objective, elbo = svi._fit.objective, svi._fit.step.loss
    tempered = objective._temper(svi.model, svi.guide)
    found = []
    for source in (None, objective._source(elbo, svi.model, svi.guide)):
        pyro.set_rng_seed(0)
        get_traces = elbo._get_traces if source is None else partial(source, elbo._get_traces)
        with expects_tempered():
            ((model_trace, guide_trace),) = get_traces(*tempered, (), {})
        rates = dict(objective._tempering.model_rates), dict(objective._tempering.guide_rates)
        found.append((model_trace, guide_trace, rates))
    assert num_uses(svi) == 3
    assert found[0][2] == found[1][2]
    for run, got in zip(found[0][:2], found[1][:2], strict=True):
        names = [name for name, site in run.nodes.items() if site["type"] == "sample"]
        assert [name for name, site in got.nodes.items() if site["type"] == "sample"] == names
        for name in names:
            for field in ("value", "scale", "log_prob", "log_prob_sum"):
                check_equal(torch.as_tensor(got.nodes[name][field]), torch.as_tensor(run.nodes[name][field]))
            if "score_parts" in run.nodes[name]:
                parts = zip(got.nodes[name]["score_parts"], run.nodes[name]["score_parts"], strict=True)
                for part, expected in parts:
                    check_equal(torch.as_tensor(part).sum(), torch.as_tensor(expected).sum())


def test_what_does_not_depend_on_the_input_is_computed_once():
    data, calls = torch.randn(5), []

    def function(x):
        constant = (data * 2).exp().sum()
        total = torch.zeros(3)
        total[:2] += x[:2]  # in place, on what does not depend on the input before
        calls.append(1)
        return [x.expand(3) * constant, total]

    operations = recorded(function, torch.ones(3))
    for x in (torch.randn(3), torch.randn(3)):
        for got, expected in zip(operations(x), function(x), strict=True):
            torch.testing.assert_close(got, expected)
    assert len(calls) == 3  # one of the record, two here
    targets = [str(node.target) for node in operations.graph.nodes]
    assert not any("exp" in target for target in targets)


def decides(y=Y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z if float(z.detach().sum()) > 0 else 2 * z, 1.0), obs=torch.tensor(1.0))


def draws_numbers(y=Y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z + 0.1 * torch.randn(()), 1.0), obs=torch.tensor(1.0))


def learns(y=Y):
    z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def takes_a_part(y=Y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12, subsample_size=3) as i:
        pyro.sample("x", dist.Normal(z, 1.0), obs=y[i])


def computes_elsewhere(y=Y):
    """NumPy's numbers are constants to a record; the first comparison shows it."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    mean = torch.as_tensor(np.tanh(z.detach().numpy()))
    pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor(1.0))


def stops_the_gradient(y=Y):
    """Values alone would not show it: what runs without a graph has one in a record."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with torch.no_grad():
        mean = z.exp()
    pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor(1.0))


@pytest.mark.filterwarnings("ignore:The model has parameters")
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (decides, "a decision by the value"),
        (draws_numbers, "random numbers"),
        (learns, "parameters of the model"),
        (takes_a_part, "a part of plate 'data'"),
        (computes_elsewhere, "another 'x'; 0 evaluations"),
        (stops_the_gradient, "another 'the gradient'; 0 evaluations"),
    ],
)
def test_what_cannot_be_recorded_runs(bad, reason):
    """With the same numbers, and one warning."""
    plain, _ = losses(lambda: adam(AutoPlanar(bad), model=bad), 12)
    with pytest.warns(UserWarning, match=reason) as caught:
        got, _ = losses(lambda: adam(AutoPlanar(bad), model=bad, record_model=True), 12)
    assert len([w for w in caught if "same operations" in str(w.message)]) == 1
    check_equal(got, plain)


def mean_of_factors(model, guide, *args, **kwargs):
    return Trace_ELBO(num_particles=5).differentiable_loss(model, guide, *args, **kwargs)


class OfOnesOwn(Trace_ELBO):
    """It might read anything."""


@pytest.mark.parametrize("kind", [TraceMeanField_ELBO, TraceGraph_ELBO, OfOnesOwn])
def test_a_loss_that_may_read_distributions_runs(kind):
    """As an analytic divergence, which reads those of the sites, where a record has old ones."""
    plain, _ = losses(lambda: adam(AutoPlanar(model), kind, path="likelihood"), 8)
    with pytest.warns(UserWarning, match=f"got a {kind.__name__}, which may read more") as caught:
        got, _ = losses(lambda: adam(AutoPlanar(model), kind, path="likelihood", record_model=True), 8)
    assert len([w for w in caught if "same operations" in str(w.message)]) == 1
    check_equal(got, plain)


def test_a_loss_that_is_a_function_runs():
    svi = AdaAnnSVI(
        model, AutoPlanar(model), Adam({"lr": 0.01}), mean_of_factors, record_model=True,
        schedule=SequenceSchedule([0.3, 1.0]),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="got a function, which may read more"):
        svi.step()


def test_a_fit_resumed_with_a_record_goes_on_as_it_would_have(tmp_path):
    whole, _ = losses(lambda: adam(AutoPlanar(model), record_model=True), 20)
    first, svi = losses(lambda: adam(AutoPlanar(model), record_model=True), 9)
    svi.save_checkpoint(tmp_path / "fit.pt")
    pyro.clear_param_store()
    svi = adam(AutoPlanar(model), record_model=True)
    svi.load_checkpoint(tmp_path / "fit.pt")
    check_equal(torch.cat([first, torch.tensor(take_steps(svi, 11))]), whole)
    assert is_used(svi)


def test_a_guide_without_a_latent_vector_runs():
    plain, _ = losses(lambda: adam(AutoNormal(model)), 8)
    with pytest.warns(UserWarning, match="AutoNormal, which is no guide with one latent vector"):
        got, _ = losses(lambda: adam(AutoNormal(model), record_model=True), 8)
    check_equal(got, plain)


def test_a_model_that_changes_later_is_found_out():
    state = {"factor": 1.0}

    def changing():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(state["factor"] * z, 1.0), obs=torch.tensor(1.0))

    pyro.clear_param_store()
    svi = adam(AutoPlanar(changing), model=changing, record_model=True)
    for _ in range(40):
        svi.step()
    assert is_used(svi)
    state["factor"] = 3.0
    with pytest.warns(UserWarning, match="another 'x'; 31 evaluations may have been wrong"):
        take_steps(svi, 40)
    assert not is_used(svi)


def test_comparisons_go_on(monkeypatch):
    uses = []
    compare = model_record.ModelRecord._compare

    def note(self, *args):
        uses.append(self._num_uses)
        compare(self, *args)

    monkeypatch.setattr(model_record.ModelRecord, "_compare", note)
    monkeypatch.setattr(model_record, "_INTERVAL", 8)
    losses(lambda: adam(AutoPlanar(model), record_model=True), 26)
    assert uses == [0, 2, 4, 8, 16, 24]


def test_other_arguments_run():
    """A record is that of its arguments; data that were changed in place are other data."""
    data = Y.clone()
    svi = losses(lambda: adam(AutoPlanar(model), record_model=True), 5, y=data)[1]
    assert num_uses(svi) == 4
    for other in ({"y": Y.clone()}, {"y": data, "factor": 2.0}, {}):
        svi.step(**other)
    data += 1
    svi.step(y=data)
    assert num_uses(svi) == 4
    with pytest.warns(UserWarning, match="other arguments at most of the steps"):
        take_steps(svi, 20, lambda: {"y": Y.clone()})


def test_another_number_of_draws_has_a_record_of_its_own():
    """As at 1, with ``num_final_particles``, or where a loss is given another number at every step."""
    plain, _ = losses(lambda: adam(AutoPlanar(model), num_final_particles=7))
    got, svi = losses(lambda: adam(AutoPlanar(model), num_final_particles=7, record_model=True))
    assert num_uses(svi) == 30 - 1
    check_equal(got, plain)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    pyro.clear_param_store()
    svi = AdaAnnSVI(model, AutoPlanar(model), Adam({"lr": 0.01}), elbo, record_model=True)
    with pytest.warns(UserWarning, match="ever another number of draws"):
        take_growing_steps(svi, elbo)


def test_broken_draws_are_dropped_and_counted():
    """A violated parameter is NaN in a record, whether or not the run would have raised an error."""

    def breaks():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, z), obs=torch.tensor(1.0))  # half of the draws are no scale

    plain, other = losses(lambda: adam(AutoPlanar(breaks), model=breaks), 20)
    got, svi = losses(lambda: adam(AutoPlanar(breaks), model=breaks, record_model=True), 20)
    assert is_used(svi)
    assert svi.history.stages[0].num_broken > 0
    check_equal(got, plain)
    assert svi.history.stages[0].num_broken == other.history.stages[0].num_broken


def test_a_matrix_without_a_factor_ends_the_record():
    def factorizes():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        matrix = torch.eye(2) * z[..., None, None]
        half = torch.linalg.cholesky(matrix)
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=half), obs=torch.ones(2))

    guide = AutoPlanar(factorizes, base_loc=6.0, base_scale=0.1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = adam(guide, model=factorizes, record_model=True, num_initial_steps=20)
    for _ in range(5):
        svi.step()
    assert is_used(svi)
    guide._base_loc.sub_(4.5)  # some draws have none from here
    with pytest.warns(UserWarning, match="cholesky"):
        found = take_steps(svi, 6)
    assert np.isfinite(found).all()
    assert 0 < svi._fit.objective.num_broken < 180


def test_nothing_is_recorded_unless_asked():
    svi = losses(lambda: adam(AutoPlanar(model)), 3)[1]
    assert svi._fit.objective.recorder is None


def test_an_error_says_what_it_is():
    def fails(x):
        raise KeyError("nothing")

    with pytest.raises(CannotRecordError, match="KeyError: 'nothing'"):
        recorded(fails, torch.ones(2))
