"""The ODE examples: the solve against autograd through torchdiffeq, references, tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import hiv
import lorenz
import pyro.poutine as poutine
import pytest
import torch
from ode import Problem, Rhs, solve, solve_with_jacobian
from posterior import REFERENCES
from torch import Tensor
from torchdiffeq import odeint


def plain_lorenz(s: Tensor, b: Tensor, r: Tensor) -> tuple[Rhs, Tensor]:
    def rhs(t: Tensor, state: Tensor) -> Tensor:
        x, y, z = state
        return torch.stack([s * (y - x), x * (r - z) - y, x * y - b * z])

    return rhs, torch.ones((3, *s.shape), dtype=s.dtype)


def plain_hiv(p1: Tensor, p2: Tensor, x2_start: Tensor) -> tuple[Rhs, Tensor]:
    def rhs(t: Tensor, y: Tensor) -> Tensor:
        x1, x2, x3 = y
        return torch.stack(
            [
                p1 - p2 * x1 - 4.1 * x1 * x3,
                4.1 * x1 * x3 - 10.2 * x2,
                p1 * 10.2 * x2 - 2.6 * x3,
            ]
        )

    return rhs, torch.stack([torch.zeros_like(p1), x2_start, torch.ones_like(p1)])


CASES = {
    "lorenz": (lorenz.lorenz, plain_lorenz, lorenz.TRUTH, lorenz.TIMES, lorenz.NUM_SUBSTEPS),
    "hiv": (hiv.hiv, plain_hiv, hiv.TRUTH, hiv.TIMES, 1),
}


def particles(truth: dict[str, float], batch_shape: tuple[int, ...]) -> Tensor:
    center = torch.tensor(list(truth.values()), dtype=torch.float64)
    noise = torch.randn(len(truth), *batch_shape, dtype=torch.float64)
    return center.reshape(-1, *(1 for _ in batch_shape)) * (1 + 0.1 * noise)


def plain_solve(problem: Problem, params: Tensor, times: Tensor, num_substeps: int) -> Tensor:
    step_size = float(times[1] - times[0]) / num_substeps
    return odeint(*problem(*params), times, method="rk4", options={"step_size": step_size})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch_shape", [(), (7,), (2, 3)])
def test_solution_and_gradient_are_those_of_torchdiffeq(name: str, batch_shape: tuple[int, ...]) -> None:
    problem, plain_problem, truth, times, num_substeps = CASES[name]
    params = particles(truth, batch_shape).requires_grad_()
    expected = plain_solve(plain_problem, params, times, num_substeps)
    actual = solve(problem, params.unbind(), times, num_substeps)
    assert actual.shape == (len(times), 3, *batch_shape)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    cotangent = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, params, cotangent)
    (actual_grad,) = torch.autograd.grad(actual, params, cotangent)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_single_precision_agrees_with_double(name: str) -> None:
    problem, _, truth, times, num_substeps = CASES[name]
    params = particles(truth, (20,))
    exact, exact_jacobian = solve_with_jacobian(problem, params, times, num_substeps)
    single, jacobian = solve_with_jacobian(problem, params.float(), times.float(), num_substeps)
    assert single.dtype == jacobian.dtype == torch.float32
    for actual, expected in ((single, exact), (jacobian, exact_jacobian)):
        error = (actual - expected).abs() / expected.abs().amax((0, 1))
        assert error.max() < 2e-3  # Lorenz multiplies rounding errors by about a thousand


@pytest.mark.parametrize("name", CASES)
def test_values_do_not_depend_on_whether_a_gradient_is_asked_for(name: str) -> None:
    problem, _, truth, times, num_substeps = CASES[name]
    params = particles(truth, (5,)).requires_grad_()
    with_graph = solve(problem, params.unbind(), times, num_substeps)
    with torch.no_grad():
        without = solve(problem, params.unbind(), times, num_substeps)
    assert not without.requires_grad
    torch.testing.assert_close(with_graph.detach(), without, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overflowing_particle_leaves_the_others_alone(dtype: torch.dtype) -> None:
    params = particles(lorenz.TRUTH, (4,)).to(dtype)
    times = lorenz.TIMES.to(dtype)
    broken = params.clone()
    broken[:, 1] = 1e6
    grads = []
    for value in (params, broken):
        value.requires_grad_()
        trajectory = solve(lorenz.lorenz, value.unbind(), times, lorenz.NUM_SUBSTEPS)
        grads.append(torch.autograd.grad(trajectory.square().sum(), value)[0])
    assert not torch.isfinite(grads[1][:, 1]).all()
    others = [0, 2, 3]
    torch.testing.assert_close(grads[1][:, others], grads[0][:, others], rtol=1e-4, atol=0)


def test_hiv_output_is_the_same_in_both_modes() -> None:
    p1, p2, x2_start = particles(hiv.TRUTH, (50,))
    one = solve(hiv.hiv, [p1, p2, x2_start], hiv.TIMES)
    other = solve(hiv.hiv, [-p1, p2, -x2_start], hiv.TIMES)
    torch.testing.assert_close(one[:, 2], other[:, 2], rtol=0, atol=0)
    torch.testing.assert_close(one[:, :2], -other[:, :2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "key"),
    [("lorenz", "0.2"), ("lorenz", "0.001"), ("hiv", "positive"), ("hiv", "negative")],
)
def test_reference_is_of_the_data_of_the_example(name: str, key: str) -> None:
    entry = json.loads((REFERENCES / f"{name}.json").read_text())["posteriors"][key]
    example = {"lorenz": lorenz, "hiv": hiv}[name]
    data_args = (float(key), lorenz.DATA_SEED) if name == "lorenz" else (hiv.DATA_SEED,)
    data = example.simulate(*data_args)
    model_args = (data, float(key)) if name == "lorenz" else (data,)
    mode = torch.tensor(entry["laplace_mode"], dtype=torch.float64, requires_grad=True)
    values = dict(zip(entry["names"], mode.unbind(), strict=True))
    log_density = poutine.trace(poutine.condition(example.model, values)).get_trace(*model_args)
    (gradient,) = torch.autograd.grad(log_density.log_prob_sum(), mode)
    assert (gradient.abs() * torch.tensor(entry["sd"])).max() < 1e-5
    assert entry["ess_share"] > 0.8


# Pyro warns of the log density of trajectories that overflow; the driver leaves these draws out.
# So few steps may lose a mode, and the export says so.
@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.filterwarnings("ignore:.*lost between inverse temperatures")
@pytest.mark.parametrize("settings", ["paper", "natural"])
@pytest.mark.parametrize("name", ["lorenz", "hiv"])
def test_fast_run(
    name: str,
    settings: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    example = {"lorenz": lorenz, "hiv": hiv}[name]
    example.main(["--fast", "--settings", settings, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "effective sample size" in printed
    assert "exact" in printed
    files = {path.name for path in tmp_path.iterdir()}
    assert {"data.png", "schedule.png", "posterior.png"} <= files
