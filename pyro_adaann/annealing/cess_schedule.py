"""The schedule of adaptive sequential Monte Carlo."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_adaann.annealing.schedules import AnnealingSchedule
from pyro_adaann.weights import winsorize

__all__ = ["CESSSchedule"]

#: Logarithm of the smallest increment, in units of the largest.
_SMALLEST = math.log(1e-5)


class CESSSchedule(AnnealingSchedule):
    r"""The next inverse temperature keeps the conditional effective sample size at a target.

    .. math:: \mathrm{CESS}(\epsilon) = \frac{(\sum_i W_i v_i)^2}{\sum_i W_i v_i^2}, \qquad
              v_i = e^{\epsilon f_i}, \quad f_i = \frac{d}{dt} \log p_t(z_i)

    with the normalized weights W of the guide's draws against the tempered density: the effective share of
    draws of :math:`p_t` as a sample of :math:`p_{t + \epsilon}`. The increment is the largest one that keeps
    the target, by bisection; at most t, since with uneven weights few draws decide it, and at least 1e-5 of
    that. For a normal log factor
    :math:`\mathrm{CESS} = e^{-\epsilon^2 \mathrm{Var} f}`: a target of 0.9 is a tolerance of 0.32 of
    :class:`AdaAnnSchedule`.

    :param target: in (0, 1).
    :param initial_inverse_temperature: the first inverse temperature, in (0, 1].
    :raises ValueError: if the target is outside (0, 1).

    Source: Zhou, Johansen and Aston, *Toward automatic model comparison: an adaptive sequential Monte Carlo
    approach*, JCGS 25 (2016), Section 3.2.2.

    Example::

        >>> import torch
        >>> f = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> round(CESSSchedule(0.9).next(0.5, f, torch.zeros(100_000)), 2)  # 0.5 + sqrt(-log 0.9)
        0.82
    """

    needs_log_factor = True

    def __init__(self, target: float = 0.9, *, initial_inverse_temperature: float = 0.01) -> None:
        super().__init__(initial_inverse_temperature)
        if not 0 < target < 1:
            raise ValueError(f"Expected `target` in (0, 1); got {target}.")
        self.target = float(target)

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        assert log_factor is not None  # `next` has checked
        return self.propose_weighted(inverse_temperature, log_factor, torch.zeros_like(log_factor))

    def propose_weighted(self, inverse_temperature: float, log_factor: Tensor, log_weight: Tensor) -> float:
        is_finite = torch.isfinite(log_factor) & torch.isfinite(log_weight)
        factors, log_weights = winsorize(log_factor[is_finite]), log_weight[is_finite].log_softmax(0)
        largest = min(inverse_temperature, self.final_inverse_temperature - inverse_temperature)
        if factors.numel() < 2:
            return inverse_temperature + 0.1 * largest

        def log_cess(increment: float) -> float:
            moved = increment * factors
            return float(2 * (log_weights + moved).logsumexp(0) - (log_weights + 2 * moved).logsumexp(0))

        if log_cess(largest) >= math.log(self.target):
            return inverse_temperature + largest
        # In log space: the increment may be many orders of magnitude smaller.
        low, high = _SMALLEST, 0.0
        for _ in range(40):
            middle = (low + high) / 2
            if log_cess(largest * math.exp(middle)) >= math.log(self.target):
                low = middle
            else:
                high = middle
        return inverse_temperature + largest * math.exp(low)
