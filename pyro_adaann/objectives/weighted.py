"""Importance weights of the guide's draws against the tempered density, as an objective."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_adaann.annealing.paths import Path
from pyro_adaann.objectives.base import Objective
from pyro_adaann.objectives.lenient import Violations
from pyro_adaann.objectives.replay import Replay, Replayed
from pyro_adaann.objectives.rows import TooLarge, refuse_large, run_in_rows
from pyro_adaann.objectives.traces import (
    TraceSource,
    check_full_plates,
    log_factors,
    log_weights,
    with_num_particles,
)
from pyro_adaann.weights import finite_or_no_weight

__all__ = ["WeighedDraws", "WeightObjective"]


#: Log weights, log factors, and the traces of model and guide.
_Weighed: TypeAlias = tuple[Tensor, Tensor | None, Trace, Trace]


@dataclass(frozen=True)
class WeighedDraws:
    """Draws of a guide and their log weights against the tempered density.

    :param log_weights: shape ``(n,)``; minus infinity where the log density is not finite.
    :param log_factors: d/dt log p_t of the draws, likewise; None where they have none.
    :param model_trace: trace of the model, without a graph, possibly for some of the draws alone.
    :param guide_trace: trace of the guide, with its graph.
    :param loss: minus the mean of the finite log weights, NaN where there is none.
    """

    log_weights: Tensor
    log_factors: Tensor | None
    model_trace: Trace
    guide_trace: Trace
    loss: float


class WeightObjective(Objective):
    r"""The divergence of the guide from the tempered density, by the weights of the guide's own draws.

    .. math:: \log w_i = \log p_t(z_i) - \log q(z_i), \quad z_i \sim q

    Discrete sites that the model enumerates are summed out. The loss is minus the mean of the finite log
    weights.

    :param path: the path of tempered densities.
    :param num_particles: n.
    :param max_plate_nesting: as in Pyro's ELBOs; guessed at the first evaluation if not given.
    :param num_recycled_draws: as in :class:`~pyro_adaann.objectives.base.Objective`.
    """

    def __init__(
        self, path: Path, num_particles: int, max_plate_nesting: float, num_recycled_draws: int
    ) -> None:
        super().__init__(path, num_recycled_draws)
        self._elbo = TraceEnum_ELBO(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=True,
            strict_enumeration_warning=False,
        )
        self._replay = Replay()
        #: On how many draws the model runs at a time; None for all.
        self._draws_at_a_time: int | None = None

    def _elbos(self) -> list[ELBO]:
        return [self._elbo]

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return minus the mean of the finite log weights of fresh draws."""
        with self._called("loss"):
            return _minus_mean(self.try_out(model, guide, args, kwargs))[0]

    def weigh(self, model: Any, guide: Any, args: Any, kwargs: Any) -> WeighedDraws:
        """Draw from the guide, with its graph, for a step.

        :raises ValueError: if a plate is subsampled.
        """

        def run() -> _Weighed:
            self.memory.start_step()
            tempered = self._temper(_without_graph(model), guide)
            source = self._source(self._elbo, model, guide, needs_graph=False)
            return self._weigh(*tempered, args, kwargs, source)

        weights, factors, model_trace, guide_trace = self.leniency.insist(run)
        loss, num_finite = _minus_mean(weights)
        drawn = WeighedDraws(weights, factors, model_trace, guide_trace, loss)
        self._look_at_sites(drawn.model_trace, drawn.guide_trace)
        if self.memory.num_draws and self._tempering is not None and drawn.log_factors is not None:
            self.memory.add(drawn.log_factors, weights, self.inverse_temperature)
        self.memory.end_step()
        self._keep(drawn)
        num_broken = len(weights) - num_finite
        self.num_broken += num_broken
        self.num_particles += len(weights)
        if num_broken:
            self.leniency.validates = False  # Pyro would warn of each of them, at every step
        return drawn

    def _keep(self, drawn: WeighedDraws) -> None:
        """Keep the draws for the steps that follow."""
        self._replay.to(drawn.log_weights.device)
        if drawn.log_factors is not None:
            self._replay.add(
                drawn.guide_trace, drawn.log_weights, drawn.log_factors, self.inverse_temperature
            )

    def replay(self, guide: Any, num_draws: int, log_mean: float, args: Any, kwargs: Any) -> Replayed | None:
        """Return weighted draws of the steps before where the guide has too little density.

        None if there are none, or if the guide's density at given points is not cheap.

        :param num_draws: how many draws are looked at.
        :param log_mean: log of the mean weight of the guide's own draws.
        """
        t = self.inverse_temperature
        return self._replay.run(self._elbo, guide, num_draws, t, log_mean, args, kwargs)

    def forget(self) -> None:
        """Drop the draws that were kept, after the guide has been set back."""
        super().forget()
        self._replay.forget()

    def state(self) -> dict[str, Any]:
        """Return what the next evaluations depend on, as plain data; :meth:`restore` takes it."""
        return {
            **super().state(),
            "replay": self._replay.state(),
            "draws_at_a_time": self._draws_at_a_time,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has returned."""
        super().restore(state)
        self._replay.restore(state["replay"])
        self._draws_at_a_time = state["draws_at_a_time"]

    def try_out(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
        """Return the log weights of fresh draws of the present guide, without recording them."""

        def run() -> Tensor:
            tempered = self._temper(model, guide)
            source = self._source(self._elbo, model, guide, needs_graph=False)
            return self._weigh(*tempered, args, kwargs, source)[0]

        # A broken draw has weight zero; without validation it raises no error and no warning.
        with torch.no_grad(), pyro.validation_enabled(False), Violations():
            return self.leniency.insist(run)

    def _weigh(self, model: Any, guide: Any, args: Any, kwargs: Any, source: TraceSource | None) -> _Weighed:
        # Sites that the guide would enumerate are drawn: one value per particle.
        guide = poutine.infer_config(guide, lambda site: {"enumerate": None})
        while True:
            try:
                if self._draws_at_a_time is None:
                    own = self._elbo._get_traces
                    get_traces = own if source is None else partial(source, own)
                    pairs = get_traces(refuse_large(model), guide, args, kwargs)
                    model_trace, guide_trace = next(iter(pairs))
                    return self._read([(model_trace, guide_trace)], guide_trace)
                vectorized = self._elbo._vectorized_num_particles(guide)
                guide_trace = prune_subsample_sites(poutine.trace(vectorized).get_trace(*args, **kwargs))
                guide_trace.compute_log_prob()
                return self._read(
                    run_in_rows(
                        self._elbo, refuse_large(model), guide_trace, self._draws_at_a_time, args, kwargs
                    ),
                    guide_trace,
                )
            except TooLarge as error:
                if self._draws_at_a_time is None:
                    # With all of Pyro's checks of a model.
                    next(iter(with_num_particles(self._elbo, 2)._get_traces(model, guide, args, kwargs)))
                self._draws_at_a_time = error.num_draws

    def _read(self, pairs: Iterable[tuple[Trace, Trace]], guide_trace: Trace) -> _Weighed:
        """Read weights and log factors of all draws off the traces of some of them at a time."""
        weights: list[Tensor] = []
        factors: list[Tensor | None] = []
        for model_trace, rows in pairs:
            check_full_plates("use Trace_ELBO.", model_trace, rows)
            weights.append(log_weights(model_trace, rows))
            if torch.is_grad_enabled() and self._tempering is not None:  # a step, and no trial
                factors.append(log_factors(self._tempering, model_trace, rows))
        log_weight = finite_or_no_weight(torch.cat(weights)).expand(self._elbo.num_particles)
        known = [part for part in factors if part is not None]
        log_factor = torch.cat(known) if known else None
        if self._tempering is None:
            log_factor = torch.zeros_like(log_weight)  # at 1, which is not left
        return log_weight, log_factor, model_trace, guide_trace


def _minus_mean(weights: Tensor) -> tuple[float, int]:
    """Return minus the mean of the finite log weights, NaN where there is none, and their number."""
    is_finite = weights > -torch.inf
    total = torch.where(is_finite, weights.double(), 0.0).sum()
    total, count = torch.stack([total, is_finite.sum().double()]).tolist()  # a graphics card is asked once
    return (-total / count if count else math.nan), int(count)


def _without_graph(model: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run
