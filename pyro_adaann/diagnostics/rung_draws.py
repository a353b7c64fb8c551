"""Draws of the rungs of a ladder, scored under each other and weighted to each other's tempered densities."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.objectives.traces import log_factors
from pyro_adaann.state.rungs import guide_at, rungs_and_guide
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.weights import effective_sample_size, finite_or_no_weight, log_mean_weight, pareto_smooth

__all__ = ["Comparison", "RungDraws", "Rungs"]

#: The inverse temperature of the draws: the log weight is linear in t, and scaling by 1/2 is exact.
_HALF = 0.5


class Comparison(NamedTuple):
    """The share of a rung's density that the rung lacks, its error, and its weights' ess and shape."""

    share: float
    se: float
    ess: float
    k_hat: float


@dataclass
class RungDraws:
    """Draws of a rung: log q under it and some others, and the log weight at t as ``offset + t * factor``.

    :param own: index of the rung.
    :param inverse_temperatures: of all rungs.
    :param log_q: log density under rungs by index.
    :param offset: log weight at t = 0, shape ``(n,)``.
    :param factor: its slope, the log factor, likewise.
    :param traces: traces of the guide with the number of draws in each.
    """

    own: int
    inverse_temperatures: list[float]
    log_q: dict[int, Tensor]
    offset: Tensor
    factor: Tensor
    traces: list[tuple[Trace, int]]

    def __len__(self) -> int:
        return len(self.factor)

    def extend(self, more: RungDraws) -> None:
        """Append other draws of the rung."""
        self.log_q = {s: torch.cat([log_q, more.log_q[s]]) for s, log_q in self.log_q.items()}
        self.offset = torch.cat([self.offset, more.offset])
        self.factor = torch.cat([self.factor, more.factor])

    def log_weights(self, s: int) -> Tensor:
        """Log weights to the density of rung s."""
        return finite_or_no_weight(self.offset + self.inverse_temperatures[s] * self.factor)

    def log_normalizer(self, s: int) -> float:
        """Log normalizer of that density."""
        return log_mean_weight(self.log_weights(s))

    def log_coverage(self, s: int, log_normalizer: float) -> Tensor:
        """Log coverage of the density of rung s by rung s."""
        log_p = self.log_q[self.own] + self.log_weights(s) - log_normalizer
        return (self.log_q[s] - log_p).nan_to_num(-torch.inf)

    def compare(self, s: int, is_lacking: Tensor, log_normalizer: float) -> Comparison:
        """Share of the density of rung s at draws that it lacks.

        :param log_normalizer: of that density, as the draws of rung s itself give it. It lacks what the
            rung lacks, so the whole is at least the sum of both.
        """
        log_weights = self.log_weights(s)
        try:
            k_hat = pareto_smooth(log_weights)[1]
        except ValueError:  # next to no draw has a weight
            return Comparison(0.0, 0.0, 0.0, math.inf)
        weights = log_weights.softmax(0)
        share = float(weights[is_lacking].sum())
        se = float((weights * (is_lacking.double() - share)).square().sum().sqrt())
        ratio = math.exp(min(log_normalizer - self.log_normalizer(s), 700.0))
        whole = max(1.0, ratio + share)
        return Comparison(share / whole, se / whole, effective_sample_size(log_weights), k_hat)


class Rungs:
    """The rungs of a fit and, as the last of them, its guide.

    :param svi: a fit with a ladder.
    :param args: arguments of model and guide as in ``svi.step``.
    :param kwargs: likewise.
    :param batch_size: draws at a time.
    :param vectorize: whether model and guide run for a batch at once.
    :raises ValueError: if the fit has no ladder or has taken no step.
    """

    def __init__(
        self, svi: AdaAnnSVI, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int, vectorize: bool
    ) -> None:
        self.rungs = rungs_and_guide(svi.ladder)
        self.inverse_temperatures = [
            svi.inverse_temperature if rung is None else rung.inverse_temperature for rung in self.rungs
        ]
        self._batch_size = batch_size
        self._parameters = svi._fit.parameters.tensors
        self._tempering = Tempering(svi.model, svi.guide, svi.path, _HALF)
        tempered = (self._tempering.model, self._tempering.guide)
        self._guide_draws = GuideDraws(tempered, args, kwargs, vectorize=vectorize)

    @property
    def num_densities(self) -> int:
        """Return how many log densities the model has for one draw."""
        return self._guide_draws.num_densities

    def draw(self, r: int, num_samples: int) -> RungDraws:
        """Draw from rung r."""
        traces, columns = [], []
        with guide_at(self.rungs[r], self._parameters):
            for batch in self._guide_draws.batches(num_samples, self._batch_size):
                factor = log_factors(self._tempering, batch.model_trace, batch.guide_trace)
                if factor is None:
                    raise ValueError(
                        "Expected a guide without enumerated sites; got one whose enumerated sites leave no "
                        "weight for a single draw. Enumerate in the model."
                    )
                log_q = self._guide_draws.guide_density(batch.guide_trace, len(batch.log_p))
                columns.append(torch.stack([log_q, batch.log_weights - _HALF * factor, factor.double()]))
                traces.append((batch.guide_trace, len(batch.log_p)))
        own, offset, factor = torch.cat(columns, dim=1)
        return RungDraws(r, self.inverse_temperatures, {r: own}, offset, factor, traces)

    def score(self, drawn: RungDraws, scorers: Iterable[int]) -> RungDraws:
        """Add the log density of the draws under other rungs, and drop their traces."""
        for s in set(scorers) - set(drawn.log_q):
            with guide_at(self.rungs[s], self._parameters):
                drawn.log_q[s] = self._guide_draws.score_guide(drawn.traces)
        drawn.traces = []
        return drawn
