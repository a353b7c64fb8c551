"""The log factors of the latest training draws, which schedules and stage rules read without a model run."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from pyro_adaann.weights import effective_sample_size, finite_or_no_weight, winsorize

__all__ = ["LogFactorMemory", "spread_within_steps"]


class LogFactorMemory:
    """Log factors and log weights of the draws of the latest steps.

    The log weight of a draw is linear in the inverse temperature, with the log factor as its slope: kept as
    its value at zero, it can be used in the stages that follow.

    :param num_draws: least number of draws to keep; 0 for none.
    """

    def __init__(self, num_draws: int) -> None:
        self.num_draws = num_draws
        self._present: list[Tensor] = []
        self._recent: deque[Tensor] = deque()
        self._num_recent = 0

    def __bool__(self) -> bool:
        return bool(self._recent)

    def start_step(self) -> None:
        """Begin a step; draws of a step that was not ended are dropped."""
        self._present.clear()

    def add(self, log_factors: Tensor, log_weights: Tensor, inverse_temperature: float) -> None:
        """Add draws of the present step, each of shape ``(n,)``; the weights are those at its temperature."""
        self._present.append(torch.stack([log_factors, log_weights - inverse_temperature * log_factors]))

    def end_step(self) -> None:
        """Keep the draws of the present step, and drop the oldest ones beyond ``num_draws``."""
        if not self._present:
            return
        draws = torch.cat(self._present, dim=1)
        self._present.clear()
        # Those of a checkpoint are read to the CPU.
        self._recent = deque(old.to(draws.device) for old in self._recent)
        self._recent.append(draws)
        self._num_recent += draws.shape[1]
        while self._num_recent - self._recent[0].shape[1] >= self.num_draws:
            self._num_recent -= self._recent.popleft().shape[1]

    def forget(self) -> None:
        """Drop all draws, after the guide has been set back."""
        self._present.clear()
        self._recent.clear()
        self._num_recent = 0

    def steps(self, inverse_temperature: float) -> list[Tensor]:
        """Return log factors and log weights at an inverse temperature, ``(2, num_draws)`` for every step."""
        return [torch.stack([d[0], d[1] + inverse_temperature * d[0]]) for d in self._recent]

    def ess_share(self, inverse_temperature: float) -> float:
        """Return the effective sample size of the draws at an inverse temperature, as a share of their
        number.

        A draw that is not finite counts and has weight zero. 1 if no draw is kept.
        """
        if not self._recent:
            return 1.0
        log_weights = torch.cat(self.steps(inverse_temperature), dim=1)[1].double()
        return effective_sample_size(finite_or_no_weight(log_weights)) / len(log_weights)

    def state(self) -> list[Tensor]:
        """Return the draws as plain data; :meth:`restore` takes it."""
        return list(self._recent)

    def restore(self, state: list[Tensor]) -> None:
        """Go on from what :meth:`state` has returned."""
        self._recent = deque(state)
        self._num_recent = sum(draws.shape[1] for draws in self._recent)


def spread_within_steps(steps: list[Tensor]) -> Tensor:
    """Return the draws of several steps, moved so that all steps have the same mean.

    The draws of one step share its mini-batch. The difference between the
    log densities of two batches is not part of the variance under the tempered posterior. Steps of a single
    draw stay as they are.
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
