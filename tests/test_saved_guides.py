"""A fitted guide in another process, and the ways to read one that do not work."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from torch import nn

from pyro_adaann import AdaAnnSVI, AutoPlanar, AutoRealNVP, LinearSchedule

X = torch.tensor([1.0, 2.0, 4.0])


def model(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


OTHER_PROCESS = """
import sys
import pyro, torch
from pyro.infer import Predictive
from pyro_adaann import AutoPlanar, diagnose
from test_saved_guides import X, model
pyro.set_rng_seed(7)  # the base of a new guide differs
guide = AutoPlanar(model, 4).initialize(X)
guide.load_state_dict(torch.load(sys.argv[1] + "/guide.pt"))
expected = torch.load(sys.argv[1] + "/expected.pt")
pyro.set_rng_seed(1)
draws = guide.sample_posterior(100, X)
assert all(torch.equal(draws[name], expected["draws"][name]) for name in draws)
assert torch.equal(guide.log_prob(draws, X), expected["density"])
assert torch.equal(guide.quantiles([0.1, 0.9], X)["scale"], expected["quantiles"])
pyro.set_rng_seed(1)
assert torch.equal(Predictive(model, guide=guide, num_samples=50)(X)["loc"], expected["predictions"])
assert diagnose((model, guide), X, num_samples=100).ess > 0
"""


def fitted(guide) -> AutoPlanar:
    svi = AdaAnnSVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(num_particles=10, vectorize_particles=True),
        schedule=LinearSchedule(3),
        num_initial_steps=20,
        num_steps_per_stage=20,
        num_final_steps=20,
    )
    svi.run(X, progress_bar=False)
    return guide


def test_a_guide_in_another_process(tmp_path):
    guide = fitted(AutoPlanar(model, 4))
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    pyro.set_rng_seed(1)
    draws = guide.sample_posterior(100, X)
    expected = {"draws": draws, "density": guide.log_prob(draws, X)}
    expected["quantiles"] = guide.quantiles([0.1, 0.9], X)["scale"]
    pyro.set_rng_seed(1)
    expected["predictions"] = Predictive(model, guide=guide, num_samples=50)(X)["loc"]
    torch.save(expected, tmp_path / "expected.pt")
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)]
    subprocess.run(command, check=True, env=environment)


@pytest.mark.parametrize("kind", ["guide", "list", "module"])
def test_a_state_for_a_guide_that_has_not_run_names_the_remedy(kind):
    def wrap(guide: AutoPlanar) -> nn.Module:
        if kind == "list":
            both = AutoGuideList(model)
            both.append(guide)
            return both
        return nn.ModuleDict({"guide": guide}) if kind == "module" else guide

    state = wrap(AutoPlanar(model, 4).initialize(X)).state_dict()
    new = wrap(AutoPlanar(model, 4))
    with pytest.raises(ValueError, match=r"one that has not run yet. Call guide.initialize\(\*args\)"):
        new.load_state_dict(state)
    new = wrap(AutoPlanar(model, 4).initialize(X))
    new.load_state_dict(state)
    for name, value in new.state_dict().items():
        assert torch.equal(value, state[name])
    AutoPlanar(model, 4).load_state_dict({})  # nothing to put anywhere


@pytest.mark.parametrize("is_called_before", [False, True])
def test_a_parameter_store_from_a_file_is_refused(is_called_before, tmp_path):
    fitted(AutoPlanar(model, 4))
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    guide = AutoPlanar(model, 4)
    if is_called_before:
        guide(X)
    pyro.get_param_store().load(tmp_path / "store")
    for run in (lambda: guide(X), lambda: guide.sample_posterior(3, X), lambda: svi_of(guide).step(X)):
        with pytest.raises(ValueError, match=r"does not reach a guide made of torch modules"):
            run()
    pyro.clear_param_store()
    guide(X)


def svi_of(guide) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())


def test_stores_of_this_process_are_left_alone():
    first, second, other = AutoPlanar(model, 4), AutoPlanar(model, 4), AutoRealNVP(model)
    for guide in (first, second, other, copy.deepcopy(first), first):
        guide(X)
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    first(X)
    trained = copy.deepcopy(first)
    pyro.clear_param_store()
    svi_of(trained).step(X)
    first(X)  # its name is the copy's in the store
    with pyro.get_param_store().scope():
        first(X)
    with pyro.settings.context(module_local_params=True):
        fitted(AutoPlanar(model, 4))(X)
