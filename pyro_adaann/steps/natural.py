"""A natural-gradient step: a direction for any damping, and a search that tries, accepts and damps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.annealing.history import Outcome, StepResult
from pyro_adaann.annealing.paths import Path
from pyro_adaann.checks import check_count
from pyro_adaann.objectives.capabilities import Capabilities
from pyro_adaann.objectives.sites import num_latents
from pyro_adaann.objectives.traces import captured_parameters
from pyro_adaann.objectives.weighted import WeightObjective
from pyro_adaann.processes.group import number_from_first
from pyro_adaann.steps.base import Call, Moved, Step
from pyro_adaann.steps.direction import NaturalDirection
from pyro_adaann.steps.scores import draw_scores, joined_scores, parameter_units
from pyro_adaann.steps.uninterrupted import uninterrupted
from pyro_adaann.weights import log_mean_weight

__all__ = ["NaturalStep", "is_not_worse"]

#: Factors on the damping after an accepted step and after a rejected trial, and the bounds of damping.
_EASE, _STIFFEN = 0.5, 4.0
_MIN_DAMPING, _MAX_DAMPING = 1e-2, 1e6
#: Replayed draws of the steps before as a share of the guide's own.
_REPLAYED = 0.25
#: Directions that are tried in one step.
_MAX_TRIALS = 6
#: Standard errors by which the affinity of a trial may be lower than before.
_MAX_FALL = 2.0
#: If the relative variance v of the weights is below the first number, that of a trial may be at most the
#: second times v, plus the third.
_VARIANCE_NEAR, _VARIANCE_FACTOR, _VARIANCE_SLACK = 1.0, 1.5, 0.02
#: From so many latent numbers on a first step tells what a fit will cost, of so many steps.
_MANY_LATENTS, _MANY_STEPS = 500, (200, 1000)


@dataclass(frozen=True)
class NaturalStep(Step):
    r"""A step along the natural gradient of a divergence that covers the mass.

    .. math:: \delta = (F + \lambda D)^{-1}
              \frac1n \sum_i r(w_i) \, \nabla_\phi \log q_\phi(z_i), \qquad
              F = \frac1n \sum_i \nabla \log q_\phi(z_i) \, \nabla \log q_\phi(z_i)^\top

    with draws :math:`z_i` of the guide, held fixed, and their weights :math:`w_i` against the tempered
    density, truncated as in :class:`~pyro_adaann.TraceMixedKL_ELBO` and of mean one. Where the guide has
    too little density, :math:`r(w) = w - 1`, as in the forward KL divergence, which covers the mass; where it
    has too much, :math:`r(w) = \log w`, clipped at -8, as in the reverse one, which removes mass outside the
    tempered density. That is the f-divergence :math:`E_q f(w)` with :math:`f''(w) = 1 / (w \min(1, w))`.
    Moving mass from one mode to another takes a joint change of all layers of a flow, which F describes; an
    optimizer that scales every parameter separately, such as Adam, takes thousands of steps for it. D is the
    diagonal of F plus a hundredth of its mean, in units that the flows of this package define.

    To the draws are added a quarter as many of the 24 steps before, a sample of the tempered density by
    their weights, with :math:`r(w) = \max(0, 1 - 1/w)`: what the guide loses by chance its own draws do not
    show, but these do. That takes a guide whose flows have an inverse in closed form (`AutoSpline`,
    `AutoRealNVP`); others do without.

    A direction is tried on a fresh batch of draws, and is accepted unless the affinity of guide and tempered
    density falls by more than its noise. After a rejection :math:`\lambda` grows and the next direction is
    tried, six at most. A step evaluates the model on two batches or more, without gradient, and computes the
    score of every draw. Discrete sites that the model enumerates are summed out. Parameters of the model are
    refused.

    Pass it to `AdaAnnSVI` in place of an optimizer and a loss; :func:`natural_svi` does so with matching
    settings. The loss that is reported is minus the ELBO.

    :param num_particles: n; a few hundred, since one step changes the guide far more than a step of Adam.
    :param max_kl: bound on :math:`\tfrac12 \delta^\top F \delta`, the divergence of one step, in nats.
    :param damping: :math:`\lambda` at the first step; later steps adapt it.
    :param max_plate_nesting: number of nested plates in the model, as in Pyro's ELBOs; guessed if not given.
    :raises ValueError: if an argument is out of range; at a step, if a plate is subsampled, the model has
        parameters, or the guide has no density at a given point or one that does not depend on all of its
        parameters.

    Source: Amari, *Natural gradient works efficiently in learning*, Neural Computation 10 (1998);
    Marquardt, *An algorithm for least-squares estimation of nonlinear parameters*, SIAM J. 11 (1963), for
    the damping; Salimans and Knowles, *Fixed-form variational posterior approximation through stochastic
    linear regression*, Bayesian Analysis 8 (2013), for the direction as a regression on the scores; Midgley
    et al., *Flow annealed importance sampling bootstrap*, ICLR 2023, for the replay of weighted draws.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_adaann import AdaAnnSVI, AutoPlanar, LinearSchedule
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> pyro.clear_param_store()  # a new fit
        >>> pyro.set_rng_seed(0)
        >>> guide = AutoPlanar(model, num_transforms=8, base_scale=2.0)
        >>> svi = AdaAnnSVI(model, guide, NaturalStep(300), schedule=LinearSchedule(9),
        ...                 num_initial_steps=1, num_steps_per_stage=1, num_final_steps=30)
        >>> history = svi.run(progress_bar=False)
        >>> history.losses[-1] < 0.2
        True
    """

    #: It weights draws by the density of a given posterior.
    capabilities: ClassVar[Capabilities] = Capabilities(drops_broken=True, needs_posterior=True)

    num_particles: int = 500
    max_kl: float = 0.02
    damping: float = 0.1
    max_plate_nesting: float = math.inf

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles, 2)
        for name in ("max_kl", "damping"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Expected `{name}` to be positive and finite; got {value}.")

    def num_draws(self) -> int:
        """Return the number of draws of a step."""
        return self.num_particles

    def start(self) -> dict[str, float]:
        """Return the damping and the relative length of the first step."""
        return {"damping": self.damping, "length": 1.0}

    def slow_down(self, state: dict[str, float], factor: float) -> dict[str, float]:
        """Return the state with step lengths multiplied by ``factor``."""
        return {**state, "length": factor * state["length"]}

    def make_objective(self, path: Path, num_recycled_draws: int) -> WeightObjective:
        """Return the weights of ``num_particles`` draws as the objective."""
        return WeightObjective(path, self.num_particles, self.max_plate_nesting, num_recycled_draws)

    def take(
        self,
        objective: WeightObjective,
        call: Call,
        state: dict[str, float],
        ready: Callable[[dict[str, Tensor]], None],
    ) -> Moved:
        """Try directions until one is accepted; without one the parameters stay as they are."""
        is_first, start = objective.sites is None, time.monotonic()
        drawn = objective.weigh(call.model, call.guide, call.args, call.kwargs)
        if math.isnan(drawn.loss):
            if is_first:
                _warn_if_many(num_latents(drawn.guide_trace), time.monotonic() - start)
            return Moved(StepResult(Outcome.DIVERGED, drawn.loss, damping=state["damping"]), state)
        parameters = _parameters(drawn.model_trace, drawn.guide_trace)
        # Before the scores, to which parameters of another guide would be idle ones.
        ready(captured_parameters(drawn.guide_trace))
        scores = draw_scores(drawn.guide_trace, parameters, len(drawn.log_weights))
        units = parameter_units(drawn.guide_trace, parameters)
        num_replayed = round(_REPLAYED * self.num_particles)
        log_mean = log_mean_weight(drawn.log_weights)
        replayed = objective.replay(call.guide, num_replayed, log_mean, call.args, call.kwargs)
        if replayed is None:
            direction = NaturalDirection(scores, drawn.log_weights, units)
        else:
            scores = joined_scores(
                scores, draw_scores(replayed.guide_trace, parameters, len(replayed.log_weights))
            )
            direction = NaturalDirection(scores, drawn.log_weights, units, replayed.log_weights)

        def is_accepted() -> bool:
            try:
                trial = objective.try_out(call.model, call.guide, call.args, call.kwargs)
            except (ValueError, torch.linalg.LinAlgError):
                return False  # the density cannot be computed there
            return is_not_worse(trial, drawn.log_weights)

        moved = self._search(direction, parameters, state, is_accepted, drawn.loss)
        if is_first:
            _warn_if_many(num_latents(drawn.guide_trace), time.monotonic() - start)
        return moved

    def _search(
        self,
        direction: NaturalDirection,
        parameters: dict[str, Tensor],
        state: dict[str, float],
        is_accepted: Callable[[], bool],
        loss: float,
    ) -> Moved:
        """Take the first direction that is accepted; adapt the damping."""
        tensors = list(parameters.values())
        damping = state["damping"]
        for num_trials in range(1, _MAX_TRIALS + 1):
            flat, kl = direction.solve(damping, self.max_kl)
            with _tried(tensors, state["length"] * flat) as trial:
                trial.keep = bool(number_from_first(is_accepted()))
            if trial.keep:
                damping = max(damping * _EASE, _MIN_DAMPING)
                kl *= state["length"] ** 2
                result = StepResult(Outcome.ACCEPTED, loss, num_trials, damping, kl)
                return Moved(result, {**state, "damping": damping})
            damping = min(damping * _STIFFEN, _MAX_DAMPING)
        result = StepResult(Outcome.REJECTED, loss, _MAX_TRIALS, damping, 0.0)
        return Moved(result, {**state, "damping": damping})


@dataclass
class _Trial:
    keep: bool = False


@contextmanager
def _tried(parameters: list[Tensor], flat: Tensor) -> Iterator[_Trial]:
    """Change parameters within the block, and restore them at its end unless the trial is to be kept."""
    values = [parameter.detach().clone() for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]
    trial = _Trial()
    try:
        with uninterrupted(), torch.no_grad():
            for parameter, part in zip(parameters, flat.split(sizes), strict=True):
                parameter.add_(part.view_as(parameter).to(parameter.dtype))
        yield trial
    finally:
        if not trial.keep:
            with uninterrupted(), torch.no_grad():
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value)


def is_not_worse(trial: Tensor, present: Tensor) -> bool:
    r"""Whether the guide of a trial is as close to p as the present one, up to noise, by their log weights.

    Close in the affinity :math:`\int \sqrt{p q} = E_q \sqrt{p / q}`, whose estimate has a finite variance
    for any p and q. The variance of the weights is no substitute: it stays small when a mode is lost, and it
    grows at first when a guide that is too narrow widens. Once it is small it is the more sensitive measure,
    and is then compared as well.
    """
    (affinity, noise, variance), (before, noise_before, variance_before) = _moments(trial, present)
    if -math.inf in (affinity, before):
        return before == -math.inf
    if variance_before < _VARIANCE_NEAR and variance > _VARIANCE_FACTOR * variance_before + _VARIANCE_SLACK:
        return False
    return affinity >= before - _MAX_FALL * math.sqrt((noise + noise_before) / len(present))


def _moments(*batches: Tensor) -> list[tuple[float, float, float]]:
    """Return the log of the mean root of the weights of every batch, and the relative variances of root and
    weight.
    """
    powers = (0.5, 1.0, 2.0)
    sums = [(p * batch.double()).logsumexp(0) - math.log(len(batch)) for batch in batches for p in powers]
    found = torch.stack(sums).tolist()
    return [_variances(*found[i : i + 3]) for i in range(0, len(found), 3)]


def _variances(half: float, one: float, two: float) -> tuple[float, float, float]:
    if one == -math.inf:
        return half, math.inf, math.inf
    return half, math.expm1(max(one - 2 * half, 0.0)), math.expm1(max(two - 2 * one, 0.0))


def _warn_if_many(num_latents: int, seconds: float) -> None:
    """Warn of a guide with more latent numbers than a few natural steps can fit, after the first step.

    :param seconds: that it took.
    """
    if num_latents > _MANY_LATENTS:
        least, most = (f"{num:,} of them ({_in_words(num * seconds)})" for num in _MANY_STEPS)
        warnings.warn(
            f"Natural steps are for up to a few hundred latent numbers; this guide has {num_latents:,}. The "
            f"first step took {seconds:.2g} s; a fit takes {least} to {most}. Use AdaAnnSVI with AutoNormal "
            f"or AutoLowRankMultivariateNormal, or give the model fewer latents.",
            stacklevel=2,
        )


def _in_words(seconds: float) -> str:
    return f"{seconds / 60:.2g} minutes" if seconds < 5400 else f"{seconds / 3600:.2g} hours"


def _parameters(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
    """Return the parameters of the guide that are trained, by name."""
    names = [name for name, value in captured_parameters(model_trace).items() if value.requires_grad]
    if names:
        raise ValueError(
            f"Expected a model without parameters, since the natural gradient is that of the guide; got "
            f"{', '.join(names)}. Use Trace_ELBO or TraceMixedKL_ELBO."
        )
    # Each once: a guide may hold a flow under two names.
    found = {id(value): (name, value) for name, value in captured_parameters(guide_trace).items()}
    return {name: value for name, value in found.values() if value.requires_grad}
