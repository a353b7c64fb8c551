"""Simulation-based calibration: quiet for a right fit, an alarm for a wrong one; resumable, in processes."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_adaann import AnnealedSMC, Calibration, simulation_based_calibration
from pyro_adaann.sampling.calibration import _Replace
from pyro_adaann.sampling.verdict import judge_ranks

SEEN = torch.zeros(4, 3)


def model(x):
    """Three means with four data each; their posterior is normal, N(0.8 mean, 0.2)."""
    with pyro.plate("sides", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def data_of(model, *args) -> torch.Tensor:
    return pyro.poutine.trace(model).get_trace(*args).nodes["x"]["value"]


def exact(model, x, scale=1.0, shift=0.0):
    mean = 0.8 * data_of(model, x).mean(0)
    return {"z": mean + math.sqrt(0.2) * (shift + scale * torch.randn(99, 3))}


def narrow(model, x):
    return exact(model, x, scale=0.8)


def wide(model, x):
    return exact(model, x, scale=1.4)


def shifted(model, x):
    return exact(model, x, shift=0.5)


def calibrate(fit, **kwargs) -> Calibration:
    return simulation_based_calibration(model, fit, SEEN, progress_bar=False, **kwargs)


def test_right_fits_are_seldom_called_wrong():
    """At most one in a hundred by construction; 26 of 1,000 would be five sds more."""
    generator = torch.Generator().manual_seed(0)
    wrong = sum(
        bool(judge_ranks({"z": torch.rand(100, 3, generator=generator)}).findings) for _ in range(1000)
    )
    assert wrong <= 25


def test_an_exact_fit_is_calibrated():
    """False failures: one in a hundred, and this seed is none."""
    calibration = calibrate(exact, num_datasets=200)
    assert calibration.is_calibrated, calibration
    assert "No sign" in str(calibration)
    assert (calibration.ranks["z"] > 0).all()
    assert (calibration.ranks["z"] < 1).all()


@pytest.mark.parametrize(
    ("fit", "words"), [(narrow, "too narrow"), (wide, "too wide"), (shifted, "too high")]
)
def test_a_wrong_fit_is_named(fit, words):
    """A scale of 0.8 is found in 150 data sets of three numbers in 200 of 200 trials, in 100 in 170."""
    calibration = calibrate(fit, num_datasets=150)
    assert not calibration.is_calibrated
    assert words in str(calibration)


def test_data_are_replaced_and_nothing_else_is():
    data = {"x": torch.full((4, 3), 7.0)}
    trace = pyro.poutine.trace(_Replace(data)(model)).get_trace(SEEN)
    assert trace.nodes["x"]["is_observed"]
    assert (trace.nodes["x"]["value"] == 7).all()
    assert not trace.nodes["z"]["is_observed"]


def test_smc_is_calibrated():
    def fit(model, x):
        smc = AnnealedSMC(model, num_particles=128, num_groups=4)
        return smc.run(x, progress_bar=False).resample(50, replacement=False)

    before = torch.get_rng_state()
    calibration = calibrate(fit, num_datasets=30)
    assert calibration.is_calibrated, calibration
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_and_a_checkpoint_give_the_same_ranks(tmp_path):
    whole = calibrate(exact, num_datasets=6, seed=3)
    file = tmp_path / "ranks"
    calibrate(exact, num_datasets=2, seed=3, checkpoint=file)
    rest = calibrate(exact, num_datasets=6, seed=3, checkpoint=file, num_processes=2)
    assert torch.equal(whole.ranks["z"], rest.ranks["z"])
    with pytest.raises(ValueError, match="with seed 3"):
        calibrate(exact, num_datasets=6, seed=4, checkpoint=file)


def test_what_cannot_be_simulated_is_refused():
    def with_factor():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z)

    def flat():
        pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))

    with pytest.raises(ValueError, match="factor 'f'"):
        simulation_based_calibration(with_factor, exact)
    with pytest.raises(ValueError, match="proper prior"):
        simulation_based_calibration(flat, exact)
    with pytest.raises(ValueError, match="draws of every latent site"):
        calibrate(lambda model, x: {})


def test_the_plot_has_a_panel_for_every_site():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure = Calibration({"a": torch.rand(50), "b": torch.rand(50, 2)}).plot()
    assert len(figure.axes) == 2
    plt.close(figure)
