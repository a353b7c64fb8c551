"""What `fit` shows while it runs."""

import sys
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_adaann import AutoPlanar, natural_svi
from pyro_adaann.fitting import progress
from pyro_adaann.fitting.progress import FitProgress


def model():
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def show_steps(monkeypatch, num_steps):
    """Show steps of five seconds each."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
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
    assert all(line.startswith("fit 1: annealing: inverse temperature ") for line in lines)
    assert all("\r" not in line and line.endswith(" left") for line in lines)


@pytest.mark.parametrize("num_steps", [1, 20])
def test_a_bar_says_how_long_the_steps_will_take(monkeypatch, capsys, num_steps):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show_steps(monkeypatch, num_steps)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "fit 1: annealing" in last
    assert ("left" in last) == (num_steps == 20)  # of the first step nothing can be told
