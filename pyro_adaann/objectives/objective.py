"""The tempered loss of one stage, with a look at every particle."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceTailAdaptive_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_adaann.annealing.paths import Path
from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.objectives.mixed_kl import TraceMixedKL_ELBO
from pyro_adaann.objectives.nonfinite import drop_broken, has_nonfinite_parameter, tame_gradients
from pyro_adaann.objectives.traces import (
    draw_log_factors,
    log_factors,
    log_weights,
    sites_of,
    with_num_particles,
    with_traces,
)
from pyro_adaann.steps.natural import TraceNaturalKL_ELBO
from pyro_adaann.weights import winsorize

__all__ = ["Objective", "sites_in", "spread_within_steps"]

#: Fresh draws behind a variance where training leaves none. With fewer, the sd is itself uncertain by
#: more than 1 / sqrt(2 * 100) = 7 %.
_NUM_FRESH_DRAWS = 100

#: What a broken draw costs more than a typical good one, in nats, see `drop_broken`.
_BROKEN_COST = 10.0

#: Losses of which a particle can be left out: their parts are sums over particles.
_DROPS_BROKEN = (Trace_ELBO, TraceMixedKL_ELBO, TraceNaturalKL_ELBO)


class Objective:
    """A loss of Pyro's, evaluated on the tempered model and guide.

    At inverse temperature 1 the loss sees model and guide themselves.

    :param loss: an ELBO or a callable ``loss(model, guide, *args, **kwargs)``.
    :param evaluate: that loss as `SVI` calls it.
    :param evaluate_and_grads: likewise, with gradients.
    :param path: the path of tempered densities.
    :param final_loss: the ELBO of the final stage, None for ``loss``.
    :param num_recycled_draws: of how many draws of the latest training steps the log factors are
        remembered, at least; 0 for none.
    :param max_gradient_ratio: bound on the gradient of one particle, see
        :func:`~pyro_adaann.objectives.traces.tame_gradients`.
    """

    def __init__(
        self,
        loss: Any,
        evaluate: Callable[..., Any],
        evaluate_and_grads: Callable[..., Any],
        path: Path,
        final_loss: ELBO | None,
        num_recycled_draws: int,
        max_gradient_ratio: float,
    ) -> None:
        self.path = path
        self.max_gradient_ratio = max_gradient_ratio
        self.num_recycled_draws = num_recycled_draws
        self.inverse_temperature = 1.0
        self.is_final = False
        #: Broken and all particles of the evaluations since `start_stage`.
        self.num_broken = 0
        self.num_particles = 0
        #: The model's sites and their distributions, by which a checkpoint knows its model.
        self.sites: list[str] | None = None
        #: Log factors of the step that runs, and of recent ones, a tensor for each.
        self._present: list[Tensor] = []
        self._recent: deque[Tensor] = deque()
        self._num_recent = 0
        self._tempering: Tempering | None = None
        self._is_training = False
        self._validates = True
        self._drops_broken = [type(elbo) in _DROPS_BROKEN for elbo in (loss, final_loss or loss)]
        self._broken_cost = [
            # The forward divergence pushes away from them already, with far less noise.
            0.0 if is_forward(elbo) else _BROKEN_COST
            for elbo in (loss, final_loss or loss)
        ]
        # Their weight says all there is to say. By the reverse divergence Adam followed them, on curved
        # ridges, ever further out.
        self._drops_lost = [
            isinstance(elbo, TraceMixedKL_ELBO) and is_forward(elbo) for elbo in (loss, final_loss or loss)
        ]
        #: Whether the loss is a number to go by; that of TraceTailAdaptive_ELBO is always infinite.
        self.reports_loss = not isinstance(loss, TraceTailAdaptive_ELBO)
        self._loss = loss
        self._calls = [(evaluate, evaluate_and_grads)] * 2
        self._variance_loss: ELBO | None = None
        self._seen: list[ELBO] = []
        if isinstance(loss, ELBO):
            self._seen = [with_traces(elbo, self._look) for elbo in (loss, final_loss or loss)]
            self._calls = [(elbo.loss, elbo.loss_and_grads) for elbo in self._seen]

    def start_stage(self, inverse_temperature: float, *, is_final: bool) -> None:
        """Evaluate at this inverse temperature from now on."""
        self.inverse_temperature = inverse_temperature
        self.is_final = is_final
        self.num_broken = self.num_particles = 0

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; call it under `torch.no_grad`."""
        return self._insist(lambda: self._evaluate(False, model, guide, args, kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss and add its gradient to the parameters' ``grad``.

        If it raises an error that :meth:`forgives` is true of, clear the gradients and call again.
        """
        return self._evaluate(True, model, guide, args, kwargs)

    def forgives(self, error: ValueError) -> bool:
        """Whether the error says no more than that a particle is broken; then validate no longer.

        Torch's validation raises when a distribution gets a parameter that is not finite: one
        trajectory that overflows would end the run. Without validation its log density is NaN, and
        the particle is left out and counted like any other.
        """
        if not self._validates or not has_nonfinite_parameter(error):
            return False
        self._validates = False
        return True

    def _insist(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except ValueError as error:
            if not self.forgives(error):
                raise
            return run()

    def _evaluate(self, is_training: bool, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        self._is_training = is_training
        self._tempering = None
        if self.inverse_temperature < 1:
            self._tempering = Tempering(model, guide, self.path, self.inverse_temperature)
            model, guide = self._tempering.model, self._tempering.guide
        before = self.num_broken, self.num_particles
        self._present.clear()
        with self._validation():
            loss = self._calls[self.is_final][is_training](model, guide, *args, **kwargs)
        self._remember()
        num_broken, num_particles = self.num_broken - before[0], self.num_particles - before[1]
        if not is_training:
            self.num_broken, self.num_particles = before
        # With every particle left out, the sum is an empty one, not a loss of zero.
        return math.nan if 0 < num_particles == num_broken else loss

    def _validation(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._validates else pyro.validation_enabled(False)

    def _look(self, model_trace: Trace, guide_trace: Trace) -> None:
        if self.sites is None:
            self.sites = sites_in(model_trace)
        if self._tempering is not None:
            if not any(_is_latent(site) for site in guide_trace.nodes.values()):
                raise ValueError(
                    "Expected a guide with at least one latent site; got none. Without latent "
                    "variables there is no posterior to anneal: use pyro.infer.SVI."
                )
            if self._is_training and self.num_recycled_draws:
                factors = log_factors(self._tempering, model_trace, guide_trace)
                if factors is not None:
                    # The log weight is linear in the inverse temperature, with the log factor as its
                    # slope: its value at zero serves the stages that follow.
                    weights = log_weights(model_trace, guide_trace)
                    offsets = weights - self.inverse_temperature * factors
                    self._present.append(torch.stack([factors, offsets]))
        if self._is_training:
            tame_gradients(guide_trace, self.max_gradient_ratio)
        if self._drops_broken[self.is_final]:
            num_broken, num_particles = drop_broken(
                model_trace,
                guide_trace,
                self._broken_cost[self.is_final] if self._is_training else 0.0,
                # Not where it is plain SVI.
                finds_lost=self._is_training and self.max_gradient_ratio < math.inf,
                drops_lost=self._drops_lost[self.is_final],
            )
            self.num_broken += num_broken
            # Pyro would warn of each of them, at every step.
            self._validates &= not num_broken
            self.num_particles += num_particles

    def _remember(self) -> None:
        if not self._present:
            return
        draws = torch.cat(self._present, dim=1)
        self._recent.append(draws)
        self._num_recent += draws.shape[1]
        while self._num_recent - self._recent[0].shape[1] >= self.num_recycled_draws:
            self._num_recent -= self._recent.popleft().shape[1]

    def ess(self) -> float:
        """Return the effective sample size of the remembered draws as a share of their number.

        Against the density at the present inverse temperature; a draw that is not finite counts, and
        has no weight. 1 where nothing is remembered.
        """
        if not self._recent:
            return 1.0
        factors, offsets = torch.cat(list(self._recent), dim=1).double()
        log_weights = offsets + self.inverse_temperature * factors
        log_weights = torch.where(torch.isfinite(log_weights), log_weights, -torch.inf)
        weights = log_weights.softmax(0)
        ess = float(1 / weights.square().sum())
        return ess / len(weights) if ess > 0 else 0.0  # NaN without any finite draw

    def draw_log_factors(
        self, num_samples: int | None, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> list[Tensor]:
        """Return d/dt log p_t of guide draws and their log weights, ``(2, num_draws)`` for every step.

        The weights are against the density at the present inverse temperature.

        :param num_samples: how many fresh draws, as of one step; None for those that training has
            made, or 100 fresh ones if it has made none.
        """
        if num_samples is None and self._recent:
            t = self.inverse_temperature
            return [torch.stack([draws[0], draws[1] + t * draws[0]]) for draws in self._recent]
        if self._variance_loss is None:
            # Once, so that Pyro guesses the nesting of plates once.
            self._variance_loss = self._make_variance_loss(num_samples or _NUM_FRESH_DRAWS)
        loss, t = self._variance_loss, self.inverse_temperature

        def draw() -> Tensor:
            with self._validation():
                tempering = Tempering(model, guide, self.path, t)
                return draw_log_factors(loss, tempering, args, kwargs)

        return [self._insist(draw)]

    def _make_variance_loss(self, num_samples: int) -> ELBO:
        elbo = self._loss if isinstance(self._loss, ELBO) else Trace_ELBO()
        return with_num_particles(elbo, num_samples)

    def state(self) -> dict[str, Any]:
        """Return what the next evaluations depend on, as plain data; :meth:`restore` takes it."""
        variance = self._variance_loss
        return {
            "num_broken": self.num_broken,
            "num_particles": self.num_particles,
            "recent": list(self._recent),
            "validates": self._validates,
            "sites": self.sites,
            # Pyro guesses it at the first evaluation, from a run of the model that uses up draws.
            "max_plate_nesting": [elbo.max_plate_nesting for elbo in self._seen],
            "damping": [getattr(elbo, "damping", None) for elbo in self._seen],
            "variance": variance and [variance.num_particles, variance.max_plate_nesting],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` has returned."""
        self.num_broken, self.num_particles = state["num_broken"], state["num_particles"]
        self._recent = deque(state["recent"])
        self._num_recent = sum(draws.shape[1] for draws in self._recent)
        self._validates = state["validates"]
        self.sites = state["sites"]
        for elbo, nesting in zip(self._seen, state["max_plate_nesting"], strict=True):
            elbo.max_plate_nesting = nesting
        for elbo, damping in zip(self._seen, state["damping"], strict=True):
            if damping is not None:
                elbo.damping = damping
        if state["variance"] is not None:
            num_samples, nesting = state["variance"]
            self._variance_loss = self._make_variance_loss(num_samples)
            self._variance_loss.max_plate_nesting = nesting


def sites_in(model_trace: Trace) -> list[str]:
    """Return the names of a model's sites with the kinds of their distributions."""
    return [
        f"{site['name']} ({_kind(site['fn'])})"
        for site in sites_of(model_trace)
        if not (site["infer"].get("is_auxiliary") or site_is_subsample(site))
    ]


def _kind(fn: Any) -> str:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def spread_within_steps(steps: list[Tensor]) -> Tensor:
    """Return the draws of several steps, moved so that all steps have the same mean.

    The draws of one step share its mini-batch. What the log density of one batch has more than that
    of another is no variance of the tempered posterior. Steps of a single draw stay as they are.
    """
    if len(steps) == 1:
        return steps[0]
    # Outliers first: one of them in a step would move all the others of that step.
    draws = winsorize(torch.cat(steps).double())
    center = draws[torch.isfinite(draws)].mean()
    moved = []
    for step in draws.split([step.numel() for step in steps]):
        finite = step[torch.isfinite(step)]
        # The spread around a step's own mean is too small by this factor.
        factor = math.sqrt(len(finite) / (len(finite) - 1)) if len(finite) > 1 else 1.0
        moved.append(center + factor * (step - finite.mean()) if len(finite) > 1 else step)
    return torch.cat(moved)


def is_forward(elbo: Any) -> bool:
    """Whether a loss has a share of the forward divergence, in which broken draws have weight zero."""
    return isinstance(elbo, TraceNaturalKL_ELBO) or getattr(elbo, "forward_weight", 0.0) > 0


def _is_latent(site: Any) -> bool:
    return site["type"] == "sample" and not site["is_observed"]
