"""The model run on a few draws at a time gives what it gives on all at once."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_adaann import AutoPlanar, AutoSpline, natural_svi
from pyro_adaann.annealing.paths import get_path
from pyro_adaann.diagnostics import lost_parts
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.rung_draws import Rungs
from pyro_adaann.objectives import rows
from pyro_adaann.objectives.weighted import WeightObjective

X = torch.linspace(-2.0, 2.0, 90).reshape(30, 3)
Y = (X.sum(-1) > 0.3).float()


def regression():
    with pyro.plate("coefficients", 3):
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Bernoulli(logits=beta @ X.T), obs=Y)


def hierarchy():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3, dim=-2):
        mean = pyro.sample("mean", dist.Normal(torch.tensor([0.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("data", 30, dim=-1), poutine.mask(mask=Y.bool()), poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(mean.sum(-1), scale), obs=X.T)


def mixture():
    weight = pyro.sample("weight", dist.Beta(2.0, 3.0))
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 30):
        kind = pyro.sample("kind", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        means = torch.where(kind == 1, mean[..., 1], mean[..., 0])
        pyro.sample("x", dist.Normal(means, 1.0), obs=X[:, 0])


MODELS = [regression, hierarchy, mixture]


def weigh(model, t, draws_at_a_time, num_particles=25):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = AutoSpline(poutine.block(model, hide=["kind"]) if model is mixture else model)
    guide.initialize()
    objective = WeightObjective(get_path("bridge"), num_particles, 2, 0)
    objective.start_stage(t, is_final=t == 1)
    objective._draws_at_a_time = draws_at_a_time
    pyro.set_rng_seed(2)
    return objective.weigh(model, guide, (), {})


@pytest.mark.parametrize("t", [0.3, 1.0])
@pytest.mark.parametrize("model", MODELS)
def test_weights_are_those_of_all_draws_at_once(model, t):
    whole = weigh(model, t, None)
    for num_draws in (2, 7):
        parts = weigh(model, t, num_draws)
        torch.testing.assert_close(parts.log_weights, whole.log_weights, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(parts.log_factors, whole.log_factors, rtol=1e-4, atol=1e-3)
        assert parts.log_weights.std() > 0.1  # of different draws


def test_no_run_has_more_numbers_than_it_should(monkeypatch):
    monkeypatch.setattr(rows, "_MAX_NUMBERS", 340)  # 10 draws of 33 numbers
    sizes = []

    def model():
        with pyro.plate("coefficients", 3):
            beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
        sizes.append(beta.numel() // 3)
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Bernoulli(logits=beta @ X.T), obs=Y)

    svi = natural_svi(model, AutoPlanar(model, 2), num_particles=25)
    svi.step()
    # All draws as far as the first large site, two for Pyro's checks, and then parts.
    start = sizes.index(25)
    assert sizes[start + 1] == 2
    assert set(sizes[start + 2 :]) == {12, 13}
    sizes.clear()
    svi.step()
    assert sorted(set(sizes)) == [12, 13]


def test_a_model_that_does_not_vectorize_says_so_in_small(monkeypatch):
    monkeypatch.setattr(rows, "_MAX_NUMBERS", 1000)
    sizes = []

    def model():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        logits = beta @ X.T  # of shape (n, 1, 30), which is n times as much under a plate of n draws
        with pyro.plate("data", 30):
            y = pyro.sample("y", dist.Bernoulli(logits=logits), obs=Y)
        sizes.append(y.numel())

    svi = natural_svi(model, AutoPlanar(model, 2), num_particles=50)
    with pytest.raises(ValueError, match="site 'y'"):
        svi.step()
    assert max(sizes) == 30  # never all 50 draws times 50


def test_a_fit_in_parts_goes_on_bit_for_bit(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "_MAX_NUMBERS", 340)

    def start():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return natural_svi(regression, AutoPlanar(regression, 2), num_particles=25)

    whole = start()
    losses = [whole.step() for _ in range(6)]
    svi = start()
    for _ in range(3):
        svi.step()
    svi.save_checkpoint(tmp_path / "fit.pt")
    resumed = start()
    resumed.load_checkpoint(tmp_path / "fit.pt")
    assert [resumed.step() for _ in range(3)] == losses[3:]


def test_batches_of_diagnostics_are_smaller_where_the_model_is_large(monkeypatch):
    monkeypatch.setattr(rows, "_MAX_NUMBERS", 340)
    guide = AutoPlanar(regression, 2).initialize()
    draws = GuideDraws((regression, guide), (), {}, vectorize=True)
    sizes = [len(batch.log_p) for batch in draws.batches(25, 20)]
    assert sum(sizes) == 25
    assert 5 < max(sizes) <= 10


@pytest.mark.parametrize("model", [regression, hierarchy])
@pytest.mark.parametrize("most", [1, 8, 500])
def test_a_guide_scores_draws_of_many_traces_as_those_of_one(model, most, monkeypatch):
    monkeypatch.setattr(rows, "_MIN_JOINED", most)
    guide = AutoSpline(model).initialize()
    draws = GuideDraws((model, guide), (), {}, vectorize=True)
    batches = [next(draws.batches(num, num)) for num in (5, 4, 1, 6, 3, 1)]
    traces = [(batch.guide_trace, len(batch.log_p)) for batch in batches]
    sizes = [num for _, num in rows.join_rows(traces)]
    assert sizes == {1: [5, 4, 1, 6, 3, 1], 8: [9, 1, 9, 1], 500: [9, 1, 9, 1]}[most]
    expected = torch.cat([draws.guide_density(*trace) for trace in traces])
    assert torch.allclose(draws.score_guide(traces), expected, atol=1e-4)


def test_a_ladder_of_a_large_model_is_compared_with_fewer_draws(monkeypatch):
    monkeypatch.setattr(lost_parts, "_MANY_DENSITIES", 11)  # a third of those of a draw
    svi = natural_svi(regression, num_particles=100, num_final_steps=2, max_plate_nesting=1)
    for _ in range(3):
        svi.step()
    rungs = Rungs(svi, (), {}, 1000, True)
    assert 33 <= rungs.num_densities < 40
    looks = lost_parts._Looks(rungs, 20_000)
    assert {len(drawn) for drawn in looks._first} == {5000 * 11 // rungs.num_densities}
