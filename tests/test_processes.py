"""Fits over several processes: equal to those of one, errors in all, a process that dies, another number."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import fits_in_processes
import interrupted_in_processes
import pyro
import pytest
import torch
from fits_in_processes import ERRORS, FITS

#: Relative to one plus the size: rounding of double precision, which fifty steps amplify.
TOLERANCE = 1e-9
#: Fits of four processes; two processes make all.
FEW_FITS = ("planar_adam", "spline_adam", "planar_natural", "spline_natural")
#: Seconds after which processes that wait for each other are ended.
PATIENCE = 300

pytestmark = pytest.mark.xdist_group("processes")  # what takes long is made once, in one worker


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipe)


def end(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that are far too short
        found = fits_in_processes.run(list(FITS))
    pyro.clear_param_store()
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each process of a group gives."""
    folder = tmp_path_factory.mktemp("group")
    names = (
        list(FITS)
        if request.param == 2
        else ["planar_adam", "spline_adam", "planar_natural", "spline_natural"]
    )
    script = str(fits_in_processes.__file__)
    group = [start(script, str(folder), str(i), str(request.param), *names) for i in range(request.param)]
    outputs = [end(process) for process in group]
    assert not any(process.returncode for process in group), "\n".join(outputs)
    return [torch.load(folder / f"{i}.pt") for i in range(request.param)]


@pytest.mark.parametrize("name", FITS)
def test_processes_give_what_one_gives(name, alone, together):
    if name not in together[0]:
        pytest.skip("made by two processes only")
    for what, expected in alone[name].items():
        found = together[0][name][what]
        assert found.shape == expected.shape, what
        difference = ((found - expected).abs() / (1 + expected.abs())).nan_to_num(0.0).max()
        assert difference < TOLERANCE, what
        assert all(torch.equal(found, other[name][what]) for other in together), what


def test_fits_show_what_is_to_be_divided(alone):
    """The comparison is of more than a stage, and of draws that are broken in some processes alone."""
    assert all(len(found["inverse temperatures"]) > 2 for name, found in alone.items() if name != "particles")
    assert all(alone[name]["broken"].sum() > 10 for name in ("broken", "rounded", "rounded_natural"))


def test_scores_are_divided(together):
    """Those of natural steps: 41 draws, and some replayed ones, in 50 steps of two fits or more."""
    assert all(found["divided"] >= 2 * 50 * fits_in_processes.NUM_PARTICLES for found in together)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("failing_in_one", "the solver has failed"),
        ("with_own_noise", "Expected a model that draws sample sites only"),
        ("with_own_site", "Expected a guide that draws every latent site"),
        ("seeded_differently", "Seed all alike"),
    ],
)
def test_errors_are_raised_in_all_processes(name, message, together):
    assert name in [model.__name__ for model in ERRORS]
    assert all(message in found["errors"][name] for found in together)


def test_error_names_the_process(together):
    assert "Process 1 raised KeyError" in together[0]["errors"]["failing_in_one"]
    assert together[1]["errors"]["failing_in_one"].startswith("KeyError")


def run_group(count: int, *arguments: str) -> list[tuple[int, str]]:
    """Run the script that is interrupted in processes that nobody watches; return codes and outputs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    script = str(interrupted_in_processes.__file__)
    group = [start(script, *arguments, RANK=str(i), WORLD_SIZE=str(count), **address) for i in range(count)]
    outputs = [end(process) for process in group]
    return [(process.returncode, output) for process, output in zip(group, outputs, strict=True)]


def torchrun(count: int, *arguments: str) -> tuple[int, str]:
    """Run the script that is interrupted, as a user would."""
    script = str(interrupted_in_processes.__file__)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", script, *arguments]
    process = start(*command)
    output = end(process)
    return process.returncode, output


def test_a_process_that_dies_ends_all_and_another_number_goes_on(tmp_path):
    checkpoint, result = str(tmp_path / "fit.pt"), tmp_path / "result.pt"
    # torchrun would end the others, perhaps before they notice.
    *others, last = run_group(4, checkpoint, str(result), "--die-at", "13")
    assert last[0] == -signal.SIGKILL
    for code, output in others:
        assert code > 0
        assert "Expected an answer of all 4 processes" in output
    assert not result.exists()
    written = Path(checkpoint).read_bytes()

    code, output = torchrun(2, checkpoint, str(result))
    assert not code, output
    assert output.count("inverse temperature 1,") == 1, output  # one process shows progress
    assert Path(checkpoint).read_bytes() != written

    pyro.set_rng_seed(0)
    expected = interrupted_in_processes.fit(None, progress_bar=False)
    found = torch.load(result)
    assert found["runs"] < 35 < expected["runs"]  # it has gone on from step 10 of 40
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert torch.allclose(found["parameters"], expected["parameters"], rtol=TOLERANCE, atol=TOLERANCE)
