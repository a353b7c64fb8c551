"""Faults to put into a fit: numbers that are not finite, a process killed while writing, a full disk."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from problems import conjugate_normal
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_adaann.state.checkpoint
from pyro_adaann import AdaAnnSchedule, AdaAnnSVI

PROBLEM = conjugate_normal()
NUM_INITIAL_STEPS = 60


class _BadGradient(torch.autograd.Function):
    """The identity, with a gradient of ``value`` where ``is_bad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_bad: Tensor, value: float) -> Tensor:
        ctx.is_bad, ctx.value = is_bad, value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.where(ctx.is_bad, ctx.value, grad), None, None


@dataclass(frozen=True)
class Fault:
    """What goes wrong in which steps of a fit.

    ``where`` is ``"density"``, ``"gradient"`` (of a density that is finite) or ``"variance"`` (the
    density of the draws behind an answer of the schedule, then ``at`` counts stages). ``share`` is
    ``"one"`` particle or ``"all"``.
    """

    where: str
    share: str
    value: float
    at: frozenset[int]


def _sound_model() -> Tensor:
    z = pyro.sample("z", dist.Normal(torch.zeros(PROBLEM.dim), PROBLEM.prior_sd).to_event(1))
    pyro.factor("x", PROBLEM.log_likelihood(z))
    return z


def faulty_fit(fault: Fault, seed: int) -> AdaAnnSVI:
    """Return a fit of the conjugate normal model, not yet run, with a fault in it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)

    def model() -> None:
        z = _sound_model()
        is_training = torch.is_grad_enabled()
        count = svi.history.num_steps if is_training else len(svi.history.stages)
        if count not in fault.at or is_training == (fault.where == "variance"):
            return
        is_bad = torch.zeros_like(z, dtype=torch.bool)
        (is_bad if fault.share == "all" else is_bad[0]).fill_(True)
        if fault.where == "gradient":
            # Less itself, which leaves the density as it is and the gradient not.
            pyro.factor("fault", (_BadGradient.apply(z, is_bad, fault.value) - z).sum(-1))
        else:
            pyro.factor("fault", torch.where(is_bad, fault.value, 0.0).sum(-1))

    svi = AdaAnnSVI(
        model,
        AutoNormal(_sound_model, init_scale=0.5),
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0),
        schedule=AdaAnnSchedule(0.5, initial_inverse_temperature=0.1),
        num_initial_steps=NUM_INITIAL_STEPS,
        num_final_steps=150,
        num_variance_samples=100,
    )
    return svi


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out the warnings of Pyro and torch about numbers that are not finite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|\\+inf|-inf)")
        yield


def survives(fault: Fault, seed: int) -> bool:
    """Run a fit with a fault in it; return whether it ends at the posterior."""
    svi = faulty_fit(fault, seed)
    try:
        with quiet():
            svi.run(progress_bar=False)
    except ValueError:
        return False
    mean, sd = PROBLEM.tempered("joint", 1.0, base=(0.0, 1.0))
    loc, scale = svi.guide.locs.z.detach(), svi.guide.scales.z.detach()
    # Adam at rate 0.02 with 20 particles strays by 0.02; the sd is 0.28.
    is_right = ((loc - mean).abs() < 0.1).all() and ((scale / sd - 1).abs() < 0.25).all()
    return bool(is_right) and svi.inverse_temperature == 1.0


#: Where a write can be cut off: after a share of the bytes, or before a call of the operating system.
WRITE_PLACES: tuple[float | str, ...] = (0.0, 0.001, 0.3, 0.9, 1.0, "fsync", "replace", "_sync_folder")


def kill_while_writing(write: Callable[[], None], place: float | str) -> None:
    """Call ``write`` in a copy of this process that SIGKILL ends at ``place``."""
    pid = os.fork()
    if pid == 0:
        try:
            _cut_off(place)
            write()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise RuntimeError(f"Expected the process to be killed at {place!r}; got status {status}.")


def _cut_off(place: float | str) -> None:
    def killed(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "_sync_folder":
        pyro_adaann.state.checkpoint._sync_folder = killed
    elif isinstance(place, str):
        setattr(os, place, killed)
    else:

        class Cut(io.FileIO):
            def write(self, content: Any) -> int:
                super().write(content[: int(place * len(content))])
                killed()
                return 0

        pyro_adaann.state.checkpoint.open = lambda path, mode: Cut(path, "w")  # type: ignore[attr-defined]


@contextlib.contextmanager
def disk_with_room_for(num_bytes: int) -> Iterator[None]:
    """Let the operating system refuse whatever makes a file larger, after writing what fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
