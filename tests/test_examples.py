"""Every example runs with a few steps; an example that no test lists fails."""

from __future__ import annotations

import importlib
from pathlib import Path

import matplotlib as mpl
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
#: Script, its arguments, and the files it writes.
SCRIPTS = {
    "bimodal": ([], {"bimodal.png", "posterior.nc"}),
    "lynx_hare": ([], {"posterior.nc", "trajectories.png", "pairs.png", "schedule.png"}),
    "mixture_1d": ([], {"posterior.nc", "densities.png", "schedule.png"}),
    "mixture_2d": ([], {"posterior.nc", "densities.png", "schedule.png"}),
    "mixture_posterior": ([], {"mixture_posterior.png"}),
    "vae_digits": ([], {"vae_digits.png"}),
}
#: What other test files run, and modules that the examples share.
ELSEWHERE = {"lorenz", "hiv", "ode", "posterior", "mixture", "comparison"}

mpl.use("Agg")


def test_every_example_is_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS) | ELSEWHERE


@pytest.mark.parametrize("name", [*SCRIPTS, "lorenz", "hiv"])
def test_help_names_the_duration_and_a_folder_of_its_own(name, capsys):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert f'"{name}_results"' in source
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    assert "Takes about" in capsys.readouterr().out


# With a few steps alone the verdict is what it should be.
@pytest.mark.filterwarnings("ignore:The verdict on the fit is:UserWarning")
# Alpha-annealing of a model that learns is among the ways that vae_digits compares.
@pytest.mark.filterwarnings("ignore:The model has parameters:UserWarning")
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_example_runs(name, tmp_path, capsys):
    arguments, files = SCRIPTS[name]
    module = importlib.import_module(name)
    module.main([*arguments, "--fast", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == files
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_lynx_hare_agrees_with_nuts(seed):
    import json

    import lynx_hare
    import pyro

    from pyro_adaann import to_arviz

    path = EXAMPLES.parent / "benchmarks" / "reference" / "lynx_hare_nuts.json"
    reference = json.loads(path.read_text())
    pyro.set_rng_seed(seed)
    svi = lynx_hare.make_svi(fast=False)
    svi.run(lynx_hare.PELTS, progress_bar=False)
    data = to_arviz(svi, lynx_hare.PELTS, num_samples=20_000, log_likelihood=False)
    for name, exact in reference.items():
        draws = data["posterior"][name]
        axis = tuple(range(draws.ndim - len(draws.shape[2:])))
        values = draws.values.reshape(-1, *draws.shape[2:])
        assert axis == (0, 1)
        for i, (mean, sd) in enumerate(
            zip(
                [exact["mean"]] if values.ndim == 1 else exact["mean"],
                [exact["sd"]] if values.ndim == 1 else exact["sd"],
                strict=True,
            )
        ):
            column = values if values.ndim == 1 else values[:, i]
            # The reference itself is uncertain by 0.015 sd and 1 %.
            assert abs(column.mean() - mean) < 0.15 * sd, name
            assert column.std() == pytest.approx(sd, rel=0.15), name
