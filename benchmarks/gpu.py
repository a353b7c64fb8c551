"""Is everything right on a graphics card, and how long does a step take there? One run, under six minutes.

    python benchmarks/gpu.py [--device cuda] [--quick] [--json FILE]

First the device against the CPU, in double precision: image, log-determinant, score, gradients by points and
inverse of every kind of flow; Gram matrix and direction of a natural step. Then a short fit of each kind on
the device, resumed from a checkpoint to the last bit. Then the time of one step, by flow and number of draws
(`gpu_steps.py`), beside the least time of its arithmetic and of its traffic at the rates that the device
shows (`floors.py`), and what was launched and waited for in it (`launches.py`). The exit status is 1 if
something is wrong. ``--device cpu --quick`` tries the script itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from gpu_steps import adam, elbo, make_model, time_steps
from torch import Tensor

from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AutoPlanar,
    AutoRealNVP,
    AutoSpline,
    Ladder,
    NaturalStep,
    TraceMixedKL_ELBO,
    diagnose,
)
from pyro_adaann.steps.direction import NaturalDirection
from pyro_adaann.transforms import (
    AffineLayer,
    ComposedFlow,
    FlowTransform,
    OuterProducts,
    PlanarStack,
    RealNVPStack,
    SplineStack,
)
from pyro_adaann.transforms.kernels import planar_recursion
from pyro_adaann.transforms.recorded import is_switched_on

#: Largest relative difference between devices in double precision.
TOLERANCE = 1e-7
#: Runs of a flow before it is compared: from the third on a card runs a record of it.
NUM_RUNS = 4
FLOWS: dict[str, Callable[[], FlowTransform]] = {
    "planar 100": lambda: PlanarStack(3, 100),
    "RealNVP 6 x 25": lambda: RealNVPStack(3, 6, [25, 25]),
    "spline 2 x 32": lambda: SplineStack(5, 2, 8, [32, 32]),
    "planar 20, affine": lambda: ComposedFlow([PlanarStack(4, 20), AffineLayer(4)]),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="a device of torch's")
    parser.add_argument("--quick", action="store_true", help="small flows and few draws")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}, pyro {pyro.__version__}")
    has_kernels = device.type == "cuda" and planar_recursion._kernels(device) is not None
    print(f"planar layers: {'Triton kernels' if has_kernels else 'one by one'}")
    has_records = device.type == "cuda" and is_switched_on()
    print(f"flows: {'recorded as CUDA graphs' if has_records else 'operation by operation'}")
    checks = check_flows(device) | check_natural_step(device)
    for what, difference in checks.items():
        print(f"{what:48} {difference:9.1e}  {'ok' if difference < TOLERANCE else 'WRONG'}")
    fits = {kind: fit_and_resume(kind, device) for kind in FITS}
    for kind, problem in fits.items():
        print(f"{'fit, ' + kind:48} {problem or 'ok'}")
    times = time_steps(device, is_quick=args.quick)
    if args.json:
        results = {"device": name, "torch": torch.__version__, "checks": checks, "fits": fits, "steps": times}
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    is_right = all(d < TOLERANCE for d in checks.values()) and not any(fits.values())
    return 0 if is_right else 1


def far_from_identity(make_flow: Callable[[], FlowTransform]) -> FlowTransform:
    torch.manual_seed(0)
    flow = make_flow().double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


def difference(here: Tensor, there: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return float((here - there.cpu()).abs().max() / here.abs().max().clamp(min=1e-300))


def check_flows(device: torch.device) -> dict[str, float]:
    found = {}
    for name, make_flow in FLOWS.items():
        flow = far_from_identity(make_flow)
        moved = copy.deepcopy(flow).to(device)
        for _ in range(NUM_RUNS):
            x = torch.randn(500, flow.input_dim, dtype=torch.float64)
            change(flow, moved)
            here, there = results(flow, x), results(moved, x.to(device))
        for what, value in here.items():
            found[f"{name}: {what}"] = difference(value, there[what])
    return found


@torch.no_grad()
def change(flow: FlowTransform, moved: FlowTransform) -> None:
    """Change the parameters of a flow and its copy on the device alike, in place as an optimizer does."""
    for here, there in zip(flow.parameters(), moved.parameters(), strict=True):
        here.add_(0.01 * torch.randn_like(here))
        there.copy_(here)


def results(flow: FlowTransform, x: Tensor) -> dict[str, Tensor]:
    """Return whatever a flow computes, on its device."""
    y, log_det = flow.forward_and_log_det(x)
    parameters = list(flow.parameters())
    gradients = torch.autograd.grad(y.square().sum() - log_det.sum(), parameters, allow_unused=True)
    by_point = flow.point_gradients(x, -x)
    return {
        "image": y.detach(),
        "log det": log_det.detach(),
        "gradient": torch.cat([g.flatten() for g in gradients if g is not None]),
        "score": flow.score(x, -x),
        "point gradients": torch.cat([dense(by_point[p]).flatten(1) for p in parameters], 1),
        "inverse": inverse(flow, y.detach()),
    }


@torch.no_grad()
def inverse(flow: FlowTransform, y: Tensor) -> Tensor:
    return flow._inverse(y)


def dense(gradient: Tensor | OuterProducts) -> Tensor:
    return gradient.dense() if isinstance(gradient, OuterProducts) else gradient


def check_natural_step(device: torch.device) -> dict[str, float]:
    found = {}
    for name, make_flow in FLOWS.items():
        flow = far_from_identity(make_flow)
        moved = copy.deepcopy(flow).to(device)
        for _ in range(NUM_RUNS):
            x, log_weights = torch.randn(300, flow.input_dim).double(), torch.randn(300).double()
            here, there = (
                natural(f, x.to(d), log_weights.to(d))
                for f, d in ((flow, torch.device("cpu")), (moved, device))
            )
        for what, value in here.items():
            found[f"{name}: natural step, {what}"] = difference(value, there[what])
    return found


def natural(flow: FlowTransform, x: Tensor, log_weights: Tensor) -> dict[str, Tensor]:
    gradients = flow.point_gradients(x, -x).values()
    scores: list[Any] = [[g] if isinstance(g, OuterProducts) else g for g in gradients]
    direction = NaturalDirection(scores, log_weights)
    return {"Gram matrix": direction._gram, "direction": direction.solve(0.1)[0]}


#: Short fits: a guide of the model, and an optimizer with a loss, or a step.
FITS: dict[str, tuple[Callable[[Any], Any], Callable[[], tuple[Any, ...]]]] = {
    "planar, Adam": (lambda m: AutoPlanar(m, 16), lambda: (adam(), elbo(50))),
    "RealNVP, mixed divergence": (
        lambda m: AutoRealNVP(m, 4, [16, 16]),
        lambda: (adam(), TraceMixedKL_ELBO(0.5, num_particles=200)),
    ),
    "planar, natural": (lambda m: AutoPlanar(m, 16), lambda: (NaturalStep(200),)),
    "spline, natural": (lambda m: AutoSpline(m, 2, 4, [16, 16]), lambda: (NaturalStep(200),)),
}


def fit_and_resume(kind: str, device: torch.device) -> str:
    """Return what is wrong with a fit on the device, nothing if nothing is."""
    make_guide, make_step = FITS[kind]

    def make_fit() -> AdaAnnSVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = make_model(3, device)
        return AdaAnnSVI(
            model,
            make_guide(model),
            *make_step(),
            schedule=AdaAnnSchedule(1.0, initial_inverse_temperature=0.1),
            ladder=Ladder(),
            num_initial_steps=5,
            num_steps_per_stage=1,
            num_final_steps=15,
        )

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fit that is far too short
        whole = make_fit()
        for _ in range(10):
            whole.step()
        whole.save_checkpoint(Path(folder) / "fit.pt")
        whole.run(progress_bar=False)
        expected = [p.detach().clone() for p in whole.guide.parameters()]
        resumed = make_fit()
        resumed.load_checkpoint(Path(folder) / "fit.pt")
        resumed.run(progress_bar=False)
        got = list(resumed.guide.parameters())
        diagnose(resumed, num_samples=500)
        draws = resumed.guide.sample_posterior(100)["z"]
    # A device without a number, "cuda", is that with the present number.
    if {p.device.type for p in (*got, draws)} != {device.type}:
        return f"parameters on {sorted({str(p.device) for p in got})}"
    if not all(torch.isfinite(p).all() for p in got):
        return "parameters that are not finite"
    if not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
        return "another fit after a checkpoint"
    return ""


if __name__ == "__main__":
    logging.getLogger("pyro").setLevel(logging.WARNING)
    sys.exit(main())
