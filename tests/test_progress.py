"""What long runs show: a bar on a terminal, a line now and then in a log."""

import sys
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_adaann import AnnealedSMC, AutoPlanar, natural_svi, polish, simulation_based_calibration
from pyro_adaann.fitting import progress
from pyro_adaann.fitting.clock import Clock
from pyro_adaann.fitting.pilot import pilot_base
from pyro_adaann.fitting.progress import FitProgress
from pyro_adaann.state import counter


def model():
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def show_steps(monkeypatch, num_steps):
    """Show steps of five seconds each."""
    now = [0.0]
    for module in (counter, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    svi = natural_svi(model, AutoPlanar(model, 2), num_particles=20)
    with FitProgress(is_shown=True) as shown:
        shown.phase("fit 1: annealing")
        for _ in range(num_steps):
            assert not svi.is_done
            svi.step()
            now[0] += 5.0
            shown.update(svi)


def test_a_log_gets_a_line_every_thirty_seconds(monkeypatch, capsys):
    show_steps(monkeypatch, 20)
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("INFO")]
    assert len(lines) == 3  # 20 steps of 5 s
    assert all(line.startswith("fit 1: annealing: step ") for line in lines)
    assert all("\r" not in line and line.endswith(" left") for line in lines)


@pytest.mark.parametrize("num_steps", [1, 20])
def test_a_bar_says_how_long_the_steps_will_take(monkeypatch, capsys, num_steps):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show_steps(monkeypatch, num_steps)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "fit 1: annealing" in last
    assert ("left" in last) == (num_steps == 20)  # of the first step nothing can be told


def smc():
    AnnealedSMC(model, num_particles=64, num_groups=4, seed=0).run()


def chains():
    polish((model, AutoPlanar(model, 2)), num_samples=30, num_warmup=2, seed=0)


def calibration():
    def fit(model):
        return AnnealedSMC(model, num_particles=32, num_groups=4).run(progress_bar=False).resample(10)

    simulation_based_calibration(model, fit, num_datasets=3)


def pilot():
    def wide():
        z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(20))

    with FitProgress(is_shown=True) as shown:
        shown.phase("fit 1: base")
        pilot_base(wide, (), {}, 20, 0, (shown, Clock(None), SimpleNamespace(requested=False)))


@pytest.mark.parametrize(
    ("run", "start"),
    [(smc, "stage "), (chains, "draw "), (calibration, "data set "), (pilot, "fit 1: base: step 0, inverse")],
)
def test_no_long_run_fills_a_log(monkeypatch, capsys, run, start):
    """The clock gains a second at every look."""
    now = iter(range(10**6))
    monkeypatch.setattr(counter, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(counter, "SECONDS_PER_LINE", 2)
    run()
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert lines
    assert all(line.startswith(start) and "\r" not in line for line in lines)


@pytest.mark.parametrize("run", [smc, chains, calibration, pilot])
def test_every_long_run_draws_a_bar_on_a_terminal(monkeypatch, capsys, run):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run()
    assert "\r" in capsys.readouterr().err
