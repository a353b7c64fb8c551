"""The one line at the end of a run whose draws need weights: when it comes, and that it comes once."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, natural_svi
from pyro_adaann.state import advice

DATA = torch.zeros(4)


def model(x: torch.Tensor, size: int | None = None) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample_size=size) as rows:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def learning(x: torch.Tensor) -> None:
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def short_fit(model, init_scale: float) -> AdaAnnSVI:
    """A fit that leaves the guide nearly as it was made; the exact sd is 0.45."""
    return AdaAnnSVI(
        model,
        AutoNormal(model, init_scale=init_scale),
        pyro.optim.Adam({"lr": 1e-6}),
        Trace_ELBO(num_particles=50, vectorize_particles=True),
        schedule=AdaAnnSchedule(5.0),
        num_initial_steps=2,
        num_final_steps=10,
    )


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == advice.__name__]


@pytest.fixture(autouse=True)
def _not_said_yet(monkeypatch):
    monkeypatch.setattr(advice, "_is_said", False)


def test_a_guide_that_needs_weights_says_so_once(caplog):
    for _ in range(2):
        pyro.clear_param_store()
        short_fit(model, 0.9).run(DATA, progress_bar=False)
    (line,) = said(caplog)
    for word in ("importance_draws", "diagnose", "fit(model, ...)", "%"):
        assert word in line
    assert "\n" not in line


def test_a_guide_that_needs_none_says_nothing(caplog):
    # The exact posterior has the sd 1 / sqrt(5).
    short_fit(model, 0.447).run(DATA, progress_bar=False)
    assert not said(caplog)


@pytest.mark.filterwarnings("ignore:The model has parameters")  # on the joint path
def test_nothing_is_said_where_draws_cannot_be_weighed(caplog):
    short_fit(model, 0.9).run(DATA, 2, progress_bar=False)  # mini-batches
    pyro.clear_param_store()
    short_fit(learning, 0.9).run(DATA, progress_bar=False)  # a parameter of the model
    pyro.clear_param_store()
    natural_svi(model, num_particles=50, num_final_steps=1).run(DATA, progress_bar=False)
    assert not said(caplog)
