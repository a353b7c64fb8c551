"""The parts of a result that are read: a line for every fit, a row for every number of a site."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.diagnostics.numbers import labels, nats, percent, rounded
from pyro_adaann.weights import weighted_mean_and_sd

__all__ = ["FitSummary", "site_rows"]

#: Rows of a table; what is left out is said.
_MAX_ROWS = 20


@dataclass(frozen=True)
class FitSummary:
    """What one of the fits of a result has found.

    :param log_evidence: its log evidence.
    :param log_evidence_se: the standard error.
    :param headline: the first words of its verdict.
    :param width: how many times as wide as that of the prior its base was.
    :param num_steps: how many steps it took; 0 for a nested Laplace approximation, without a flow.
    :param seconds: how long it took.
    :param share: how much it holds of what all fits hold together; None if its draws are left out.
    :param difference: largest difference of a distribution function from that of all fits together, as a
        share of the draws: what is left of it where fits agree is noise.
    :param where: the number that differs most.

    Example::

        >>> print(FitSummary(-1.52, 0.01, "GOOD", 1.0, 120, 2.5, 1.0, 0.0, ""))
        GOOD, log evidence -1.520 +- 0.010, 120 steps, 2.5 s
        >>> print(FitSummary(-1.92, 0.01, "GOOD", 1.0, 120, 2.5, 0.67, 0.33, "z"))
        GOOD, log evidence -1.920 +- 0.010, 120 steps, 2.5 s; holds 67%, z differs by 33%
    """

    log_evidence: float
    log_evidence_se: float
    headline: str
    width: float
    num_steps: int
    seconds: float
    share: float | None
    difference: float | None
    where: str

    @property
    def counts(self) -> bool:
        """Whether its draws are among those of the result."""
        return self.share is not None

    def __str__(self) -> str:
        base = "" if self.width == 1 else f", base {rounded(self.width, 2)} times as wide"
        steps = f"{self.num_steps} steps" if self.num_steps else "without a flow"
        text = (
            f"{self.headline}, log evidence {nats(self.log_evidence)} +- {nats(self.log_evidence_se)}, "
            f"{steps}, {rounded(self.seconds)} s{base}"
        )
        if self.share is None or self.difference is None:
            return f"{text}; left out"
        if not self.where or (self.share == 1 and not self.difference):  # one fit is all
            return text
        return f"{text}; holds {percent(self.share)}, {self.where} differs by {percent(self.difference)}"


def site_rows(draws: WeightedDraws) -> list[tuple[str, ...]]:
    """Return a heading, and name, mean, sd and quantiles of 5 % and 95 % of every number of every site."""
    rows: list[tuple[str, ...]] = [("", "mean", "sd", "5 %", "95 %")]
    num_left = 0
    for name, values in draws.samples.items():
        columns = values.reshape(len(values), -1).T
        for label, column in zip(labels(name, values.shape[1:]), columns, strict=True):
            if len(rows) > _MAX_ROWS:
                num_left += 1
                continue
            mean, sd = weighted_mean_and_sd(column, draws.log_weights)
            low, high = _quantiles(column, draws.log_weights)
            digits = _num_digits(mean, sd)
            places = f"{mean:.{digits}g}", f"{low:.{digits}g}", f"{high:.{digits}g}"
            rows.append((label, places[0], f"{sd:.4g}", *places[1:]))
    if num_left:
        rows.append((f"and {num_left} more", "", "", "", ""))
    return rows


def _num_digits(mean: float, sd: float) -> int:
    """Return how many digits of a number tell values apart that differ by a few hundredths of an sd."""
    if not sd > 0 or not math.isfinite(mean / sd):
        return 4
    return min(max(4, math.ceil(math.log10(max(abs(mean) / sd, 1.0))) + 2), 15)


def _quantiles(values: Tensor, log_weights: Tensor) -> tuple[float, float]:
    """Return the weighted quantiles of 5 % and 95 %."""
    order = values.argsort()
    total = log_weights.double().softmax(0)[order].cumsum(0)
    index = torch.searchsorted(total, torch.tensor([0.05, 0.95]).to(total)).clamp(max=len(values) - 1)
    low, high = values[order][index].tolist()
    return low, high
