"""What the driver checks: its arguments once, losses and gradients at every step."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pyro
import pyro.infer.util
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_adaann.annealing.paths import Path
from pyro_adaann.annealing.schedules import AnnealingSchedule
from pyro_adaann.annealing.stage_rules import StageRule
from pyro_adaann.checks import check_count
from pyro_adaann.objectives.capabilities import check_can_temper
from pyro_adaann.objectives.mixed_kl import TraceMixedKL_ELBO
from pyro_adaann.objectives.tempered_elbo import TemperedTrace_ELBO
from pyro_adaann.objectives.traces import with_num_particles
from pyro_adaann.state.rungs import Ladder
from pyro_adaann.steps.natural import TraceNaturalKL_ELBO

__all__ = [
    "check_ladder",
    "check_parts",
    "check_stage_rule",
    "choose_final_loss",
    "is_finite",
    "nonfinite_sites",
    "to_float",
]


def check_parts(guide: Any, optim: Any, loss: Any, schedule: AnnealingSchedule, path: Path) -> None:
    """Raise a `ValueError` if these parts do not go together."""
    if not isinstance(optim, PyroOptim):
        raise ValueError(
            f"Expected `optim` to be a pyro.optim.PyroOptim; got {type(optim).__name__}. Use for "
            f"example pyro.optim.Adam({{'lr': 0.001}})."
        )
    if not isinstance(schedule, AnnealingSchedule):
        raise ValueError(
            f"Expected `schedule` to be an AnnealingSchedule; got {type(schedule).__name__}. For a "
            f"list of inverse temperatures use SequenceSchedule."
        )
    if isinstance(loss, ELBO):
        check_count("loss.num_particles", loss.num_particles, 1)
    if isinstance(loss, TemperedTrace_ELBO):
        raise ValueError(
            "Expected a loss of the untempered model; got TemperedTrace_ELBO, which AdaAnnSVI would "
            "temper once more. Use Trace_ELBO here, or TemperedTrace_ELBO with pyro.infer.SVI."
        )
    if schedule.needs_log_factor and path.entropy != 1:
        raise ValueError(
            f"Expected a fixed schedule on path {path.name!r}; got {type(schedule).__name__}. Its steps "
            f"are equal in the KL divergence between tempered posteriors of a given model, and KL "
            f"warm-up is for a model that is still being learned. Use LinearSchedule, CosineSchedule or "
            f"SequenceSchedule."
        )
    if isinstance(loss, TraceMixedKL_ELBO | TraceNaturalKL_ELBO) and path.entropy != 1:
        raise ValueError(
            f"Expected a loss that is linear in the log densities on path {path.name!r}; got "
            f"{type(loss).__name__}, whose weights are those of a given posterior. Use Trace_ELBO."
        )
    if schedule.initial_inverse_temperature < 1:
        check_can_temper(guide, loss, path)


def check_stage_rule(rule: Any, loss: Any, path: Path) -> None:
    """Raise a `ValueError` if a stage rule is none, or cannot be asked on this path with this loss."""
    if rule is None:
        return
    if not isinstance(rule, StageRule):
        raise ValueError(
            f"Expected `stage_rule` to be a StageRule; got {type(rule).__name__}. Use for example "
            f"ESSStageRule(0.3)."
        )
    if not isinstance(loss, ELBO):
        raise ValueError(
            f"Expected an ELBO, whose particles a stage rule weighs; got a {type(loss).__name__}. Use "
            f"Trace_ELBO."
        )
    if path.entropy != 1:
        raise ValueError(
            f"Expected a path of tempered posteriors with a stage rule; got {path.name!r}, on which the "
            f"model itself moves. Leave the rule out."
        )


def check_ladder(ladder: Ladder | None, path: Path) -> None:
    """Raise a `ValueError` if a ladder is none, or its rungs could not be compared on this path."""
    if ladder is None:
        return
    if not isinstance(ladder, Ladder):
        raise ValueError(
            f"Expected `ladder` to be a Ladder; got {type(ladder).__name__}. Use for example Ladder()."
        )
    if path.entropy != 1:
        raise ValueError(
            f"Expected a path of tempered posteriors with a ladder; got {path.name!r}, on which the model "
            f"itself moves. Leave the ladder out."
        )


def choose_final_loss(loss: Any, final_loss: Any, num_final_particles: int | None) -> ELBO | None:
    """Return the ELBO of the final stage, None for ``loss`` itself.

    :raises ValueError: if the arguments contradict each other.
    """
    check_count("num_final_particles", num_final_particles, 1)
    if final_loss is None and num_final_particles is None:
        return None
    if not isinstance(loss, ELBO):
        raise ValueError(
            f"Expected an ELBO as `loss`, which has particles, with `num_final_particles` or `final_loss`; "
            f"got a {type(loss).__name__}."
        )
    if num_final_particles is not None and final_loss is None:
        return with_num_particles(loss, num_final_particles)
    if num_final_particles is not None:
        raise ValueError(
            "Expected one of `final_loss` and `num_final_particles`; got both. A final loss has its own "
            "`num_particles`."
        )
    if not isinstance(final_loss, ELBO) or isinstance(final_loss, TemperedTrace_ELBO):
        raise ValueError(
            f"Expected `final_loss` to be an ELBO of the untempered model; got {type(final_loss).__name__}. "
            f"Use for example Trace_ELBO."
        )
    return final_loss


def to_float(loss: Any) -> Any:
    """Return a loss as a float, or a tuple of losses, e.g. of ReweightedWakeSleep, as one of floats."""
    if isinstance(loss, tuple):
        return type(loss)(map(pyro.infer.util.torch_item, loss))
    return pyro.infer.util.torch_item(loss)


def is_finite(params: Collection[Tensor], loss: Any) -> bool:
    """Whether a loss and the gradients of ``params`` are finite, and their squares too.

    A gradient of 1e20 is finite in single precision and its square is not: in Adam's memory it would
    be infinite, and every later update zero, without a word.
    """
    if not all(map(math.isfinite, loss if isinstance(loss, tuple) else (loss,))):
        return False
    grads = [param.grad for param in params if param.grad is not None]
    # Roots of sums of squares: finite only if all the squares are.
    norms = list(torch._foreach_norm(grads)) if grads else []
    return all(map(math.isfinite, torch.stack(norms).tolist())) if norms else True


def nonfinite_sites(model: Any, guide: Any, args: Any, kwargs: Any) -> list[str]:
    """Return the names of the sites whose log density is not finite in one fresh draw."""
    names = []
    with pyro.validation_enabled(False), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and name not in names:
                    log_prob = torch.as_tensor(site["fn"].log_prob(site["value"]))
                    if not torch.isfinite(log_prob).all():
                        names.append(name)
    return names
