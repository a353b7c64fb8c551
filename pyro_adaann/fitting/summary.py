"""The parts of a result that are read: a line for every fit, a row for every number of a site."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.diagnostics.numbers import nats, rounded
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
    :param num_steps: how many steps it took.
    :param seconds: how long it took.
    :param counts: whether its draws are among those of the result.

    Example::

        >>> print(FitSummary(-1.52, 0.01, "GOOD", 1.0, 120, 2.5, True))
        GOOD, log evidence -1.520 +- 0.010, 120 steps, 2.5 s
    """

    log_evidence: float
    log_evidence_se: float
    headline: str
    width: float
    num_steps: int
    seconds: float
    counts: bool

    def __str__(self) -> str:
        base = "" if self.width == 1 else f", base {rounded(self.width, 2)} times as wide"
        left_out = "" if self.counts else ", left out"
        return (
            f"{self.headline}, log evidence {nats(self.log_evidence)} +- {nats(self.log_evidence_se)}, "
            f"{self.num_steps} steps, {rounded(self.seconds)} s{base}{left_out}"
        )


def site_rows(draws: WeightedDraws) -> list[tuple[str, ...]]:
    """Return a heading, and name, mean, sd and quantiles of 5 % and 95 % of every number of every site."""
    rows: list[tuple[str, ...]] = [("", "mean", "sd", "5 %", "95 %")]
    num_left = 0
    for name, values in draws.samples.items():
        shape = values.shape[1:]
        for index in itertools.product(*map(range, shape)):
            if len(rows) > _MAX_ROWS:
                num_left += 1
                continue
            label = name + (f"[{', '.join(map(str, index))}]" if index else "")
            column = values
            for i in index:
                column = column[:, i]
            mean, sd = weighted_mean_and_sd(column, draws.log_weights)
            low, high = _quantiles(column, draws.log_weights)
            rows.append((label, *(f"{number:.4g}" for number in (mean, sd, low, high))))
    if num_left:
        rows.append((f"and {num_left} more", "", "", "", ""))
    return rows


def _quantiles(values: Tensor, log_weights: Tensor) -> tuple[float, float]:
    """Return the weighted quantiles of 5 % and 95 %."""
    order = values.argsort()
    total = log_weights.double().softmax(0)[order].cumsum(0)
    index = torch.searchsorted(total, torch.tensor([0.05, 0.95]).to(total)).clamp(max=len(values) - 1)
    low, high = values[order][index].tolist()
    return low, high
