r"""Thermodynamic integration: the log evidence from the temperatures that a fit has visited.

With the normalizing constant :math:`Z_t` of the tempered density and the log factor
:math:`g = \frac{d}{dt} \log p_t`, which does not depend on t,

.. math:: \log Z_1 = \log Z_{t_0} + \int_{t_0}^1 E_{p_t}[g] \, dt,
          \qquad \frac{d}{dt} E_{p_t}[g] = \mathrm{Var}_{p_t}[g] .

At every stage the driver keeps mean and standard deviation of g, weighted by the importance weights of
the draws against :math:`p_t`: the guide always lags somewhat, and unweighted means would make the
integral too low by a nat or more. The trapezoidal rule with the variances as slopes integrates them
(Friel, Hurn & Wyse, *Improving power posterior estimation of statistical evidence*, 2014).

It finds what the weights of the final guide miss: if the guide loses one of two equal modes, its weights give
log Z - log 2 with a small k-hat, and the integral still gives log Z, since g has the same distribution in
both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from pyro_adaann.annealing.history import AnnealingHistory
from pyro_adaann.annealing.paths import Path
from pyro_adaann.annealing.tempering import Tempering
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.objectives.traces import log_factors
from pyro_adaann.weights import (
    effective_sample_size,
    finite_or_no_weight,
    log_mean_error,
    log_mean_weight,
    weighted_mean_and_sd,
)

__all__ = [
    "TemperatureNode",
    "ThermodynamicEstimate",
    "final_node",
    "history_nodes",
    "integrate",
]

_STAGE_FIELDS = (
    "weighted_log_factor_mean",
    "weighted_log_factor_sd",
    "log_factor_sd",
    "log_normalizer",
    "ess",
)


@dataclass(frozen=True)
class TemperatureNode:
    """The log factor at one inverse temperature.

    :param inverse_temperature: t in (0, 1].
    :param mean: its mean under the tempered density.
    :param sd: its standard deviation there.
    :param ess: effective sample size of both.
    :param log_normalizer: log of the normalizing constant, by the weights of the same draws.
    :param log_normalizer_se: its standard error.
    """

    inverse_temperature: float
    mean: float
    sd: float
    ess: float
    log_normalizer: float
    log_normalizer_se: float


@dataclass(frozen=True)
class ThermodynamicEstimate:
    """A log evidence by thermodynamic integration.

    :param log_evidence: the estimate, in nats.
    :param standard_error: its Monte Carlo error.
    :param quadrature_error: change of the estimate by the slopes, a bound on the error of the quadrature.
    """

    log_evidence: float
    standard_error: float
    quadrature_error: float

    @property
    def error(self) -> float:
        """Both errors together."""
        return math.hypot(self.standard_error, self.quadrature_error)


def integrate(nodes: Sequence[TemperatureNode]) -> ThermodynamicEstimate:
    """Return the log evidence from nodes in the order of their inverse temperatures, the last one 1.

    Example::

        >>> means, sds = (-4.0, -2.0, -1.0), (2.0, 1.0, 0.7)
        >>> nodes = [TemperatureNode(t, mean, sd, 100.0, -1.0, 0.0)
        ...          for t, mean, sd in zip((0.2, 0.6, 1.0), means, sds)]
        >>> round(integrate(nodes).log_evidence, 2)
        -2.75
    """
    total, quadrature_error = nodes[0].log_normalizer, 0.0
    weights = [0.0] * len(nodes)
    for i, (left, right) in enumerate(pairwise(nodes)):
        width = right.inverse_temperature - left.inverse_temperature
        weights[i] += width / 2
        weights[i + 1] += width / 2
        correction = -(width**2) * (right.sd**2 - left.sd**2) / 12
        total += width * (left.mean + right.mean) / 2 + correction
        quadrature_error += abs(correction)
    variance = nodes[0].log_normalizer_se ** 2
    variance += sum((w * node.sd) ** 2 / node.ess for w, node in zip(weights, nodes, strict=True))
    return ThermodynamicEstimate(total, math.sqrt(variance), quadrature_error)


def history_nodes(history: AnnealingHistory) -> list[TemperatureNode]:
    """Return the nodes of the stages below 1.

    An empty list if the schedule needed no draws in one of them, or if a plate was subsampled: weights
    against a random part of the data are biased, and the integral is too large.
    """
    stages = [stage for stage in history.present_pass if stage.inverse_temperature < 1]
    nodes = []
    for stage in stages:
        values: list[Any] = [getattr(stage, name) for name in _STAGE_FIELDS]
        if None in values or stage.is_subsampled:
            return []
        mean, weighted_sd, sd, log_normalizer, ess = values
        # With few effective draws the weighted sd is too small; the unweighted one bounds it from below.
        weighted_sd = max(weighted_sd, sd / math.sqrt(ess))
        se = log_mean_error(ess, stage.num_draws - stage.num_nonfinite_draws)
        nodes.append(TemperatureNode(stage.inverse_temperature, mean, weighted_sd, ess, log_normalizer, se))
    return nodes


def final_node(
    svi: Any,
    path: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    batch_size: int,
    vectorize: bool,
) -> TemperatureNode:
    """Draw the node at t = 1 from a fitted guide."""
    # The log factor does not depend on t, and with t = 1/2 scaling is exact.
    t = 0.5
    tempering = Tempering(svi.model, svi.guide, path, t)
    draws = GuideDraws((tempering.model, tempering.guide), args, kwargs, vectorize=vectorize)
    pairs = []
    for batch in draws.batches(num_samples, batch_size):
        factors = log_factors(tempering, batch.model_trace, batch.guide_trace)
        if factors is not None:
            pairs.append(torch.stack([factors.double(), batch.log_weights]))
    factors, log_weights = torch.cat(pairs, dim=1)
    log_weights = finite_or_no_weight(log_weights + (1 - t) * factors)
    mean, sd = weighted_mean_and_sd(factors, log_weights)
    ess = effective_sample_size(log_weights)
    se = log_mean_error(ess, num_samples)
    return TemperatureNode(1.0, mean, sd, ess, log_mean_weight(log_weights), se)
