r"""Annealing schedules: which inverse temperature comes after which.

A schedule is pure. The driver asks it at the end of a stage, outside the training loop::

    inverse_temperature = schedule.next(inverse_temperature, log_factor)

and obeys. The answers are strictly increasing, finite, and end at exactly 1, whatever the
``log_factor`` draws are: :meth:`AnnealingSchedule.next` sees to it for every schedule.

To write another, subclass :class:`AnnealingSchedule`, implement :meth:`~AnnealingSchedule.propose`
and, if it reads the draws, set ``needs_log_factor = True``::

    class GeometricSchedule(AnnealingSchedule):
        def __init__(self, factor, *, initial_inverse_temperature=0.01):
            super().__init__(initial_inverse_temperature)
            self.factor = factor

        def propose(self, inverse_temperature, log_factor):
            return self.factor * inverse_temperature
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AdaAnnSchedule",
    "AnnealingSchedule",
    "ConstantSchedule",
    "LinearSchedule",
    "SequenceSchedule",
    "standard_deviation",
]

#: Of a draw from the median, in units of the median distance.
_MAX_DISTANCE = 50.0


class AnnealingSchedule(ABC):
    """Base class of all schedules.

    :param initial_inverse_temperature: the first inverse temperature, in (0, 1].
    :raises ValueError: if it is outside (0, 1].
    """

    #: Whether `propose` reads draws of the log factor; if not, none are made.
    needs_log_factor: bool = False

    def __init__(self, initial_inverse_temperature: float) -> None:
        self.initial_inverse_temperature = _check_inverse_temperature(
            "initial_inverse_temperature", initial_inverse_temperature
        )

    @property
    def final_inverse_temperature(self) -> float:
        """The inverse temperature at which annealing ends."""
        return 1.0

    @abstractmethod
    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        """Return the next inverse temperature, not necessarily a legal one.

        :param inverse_temperature: the current one, below the final one.
        :param log_factor: draws of d/dt log p_t under the guide, float64, shape ``(num_draws,)``;
            possibly none, possibly not finite. None if ``needs_log_factor`` is false.
        """

    def next(self, inverse_temperature: float, log_factor: Any = None) -> float:
        """Return the inverse temperature that follows, strictly larger unless it is the final one.

        :param inverse_temperature: the current one, in (0, 1].
        :param log_factor: draws of the log factor under the guide, any shape, or None.
        :raises ValueError: if the inverse temperature is outside (0, 1], or draws are needed and
            none were given.
        """
        current = _check_inverse_temperature("inverse_temperature", inverse_temperature)
        final = self.final_inverse_temperature
        if current >= final:
            return final
        draws = None
        if self.needs_log_factor:
            if log_factor is None:
                raise ValueError(
                    f"Expected draws of the log factor, which {type(self).__name__} reads; got None."
                )
            draws = torch.as_tensor(log_factor, dtype=torch.float64).detach().flatten().cpu()
        proposal = float(self.propose(current, draws))
        if math.isnan(proposal):
            proposal = current
        return min(max(proposal, math.nextafter(current, math.inf)), final)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class AdaAnnSchedule(AnnealingSchedule):
    r"""AdaAnn: every stage moves the tempered density by about the same KL divergence.

    .. math:: \epsilon = \frac{\tau}{\mathrm{sd}_{q_t}[\log p]}, \qquad
              \mathrm{KL}(p_t \| p_{t+\epsilon}) = \tfrac12 \epsilon^2 \mathrm{Var}_{p_t}[\log p]
              + O(\epsilon^3) \approx \tfrac12 \tau^2

    The sd (with the number of draws minus one in the denominator) is that of the finite draws, outliers
    moved in (:func:`standard_deviation`). Where
    they say nothing (fewer than two, or all equal to rounding), the increment is that of a
    two-dimensional normal posterior, :math:`\tau t`, with at most 0.1 for :math:`\tau`: annealing goes on
    carefully and never jumps. For the same reason an increment is at least 1 % of :math:`\tau t`, the
    one of a normal posterior in 20,000 dimensions, so a few absurd draws cannot stall it.

    :param tolerance: :math:`\tau` > 0. The paper uses 0.005 to 0.01 for multimodal posteriors and 0.5 for
        a unimodal one; 1 loses modes.
    :param initial_inverse_temperature: the first inverse temperature, in (0, 1].
    :raises ValueError: if the tolerance is not a positive number.

    Source: Cobian et al., *AdaAnn*, arXiv 2202.00792, Theorem 1, Eq. 19 and Algorithm 1.

    Example::

        >>> import torch
        >>> schedule = AdaAnnSchedule(tolerance=0.01)
        >>> schedule.next(0.5, torch.tensor([-1.0, 0.0, 1.0]))
        0.51
        >>> schedule.next(0.5, torch.tensor([-1.0, 0.0, 1.0, float("nan")]))
        0.51
    """

    needs_log_factor = True

    def __init__(self, tolerance: float = 0.01, *, initial_inverse_temperature: float = 0.01) -> None:
        super().__init__(initial_inverse_temperature)
        if not 0 < tolerance < math.inf:
            raise ValueError(f"Expected `tolerance` > 0; got {tolerance}.")
        self.tolerance = float(tolerance)

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        assert log_factor is not None  # `next` has checked
        sd = standard_deviation(log_factor)
        normal_increment = self.tolerance * inverse_temperature
        if sd is None:
            increment = min(self.tolerance, 0.1) * inverse_temperature
        else:
            increment = max(self.tolerance / sd, 0.01 * normal_increment)
        return inverse_temperature + increment


class LinearSchedule(AnnealingSchedule):
    r"""Equal increments, :math:`t_j = t_0 + j (1 - t_0) / K` for j = 0, ..., K.

    :param num_increments: K >= 1.
    :param initial_inverse_temperature: :math:`t_0` in (0, 1].
    :raises ValueError: if K is not an integer >= 1.

    Source: Rezende & Mohamed (2015); Cobian et al., *AdaAnn*, Section 2.3.

    Example::

        >>> LinearSchedule(num_increments=9, initial_inverse_temperature=0.1).next(0.1)
        0.2
    """

    def __init__(self, num_increments: int, *, initial_inverse_temperature: float = 0.01) -> None:
        super().__init__(initial_inverse_temperature)
        if not isinstance(num_increments, int) or num_increments < 1:
            raise ValueError(f"Expected `num_increments` an integer >= 1; got {num_increments!r}.")
        self.num_increments = num_increments

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        # Through the index, so that rounding errors do not add up over thousands of increments.
        start = self.initial_inverse_temperature
        step = (1 - start) / self.num_increments
        index = math.floor((inverse_temperature - start) / step + 1e-6) + 1
        return 1.0 if index >= self.num_increments else start + index * step


class SequenceSchedule(AnnealingSchedule):
    """The inverse temperatures that the user gives.

    :param inverse_temperatures: strictly increasing numbers in (0, 1], the last one 1.
    :raises ValueError: if they are not.

    Example::

        >>> SequenceSchedule([0.01, 0.1, 0.5, 1.0]).next(0.1)
        0.5
    """

    def __init__(self, inverse_temperatures: Sequence[float]) -> None:
        values = [float(value) for value in inverse_temperatures]
        if not values:
            raise ValueError("Expected at least one inverse temperature; got none.")
        super().__init__(values[0])
        if any(not a < b for a, b in zip(values[:-1], values[1:], strict=True)):
            raise ValueError(f"Expected strictly increasing inverse temperatures; got {values}.")
        if values[-1] != 1.0:
            raise ValueError(
                f"Expected the last inverse temperature to be 1, where the posterior is; got "
                f"{values[-1]}. Append 1.0, or use ConstantSchedule to stay at one temperature."
            )
        self.inverse_temperatures = values

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        index = bisect.bisect_right(self.inverse_temperatures, inverse_temperature)
        return self.inverse_temperatures[index]


class ConstantSchedule(AnnealingSchedule):
    """One inverse temperature from the first step to the last.

    At 1 (the default) it is no annealing: `AdaAnnSVI` then does what `pyro.infer.SVI` does. Below 1
    the guide is fitted to the *tempered* posterior and stays there.

    :param inverse_temperature: in (0, 1].
    :raises ValueError: if it is outside (0, 1].

    Example::

        >>> ConstantSchedule().initial_inverse_temperature
        1.0
    """

    def __init__(self, inverse_temperature: float = 1.0) -> None:
        super().__init__(inverse_temperature)

    @property
    def final_inverse_temperature(self) -> float:
        return self.initial_inverse_temperature

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        return self.initial_inverse_temperature


def standard_deviation(draws: Tensor) -> float | None:
    """Return the sd of the finite draws, or None where they do not determine one.

    That is with fewer than two finite draws, or a spread below the rounding errors of
    single-precision numbers of their size. Safe against overflow of the squares.

    Draws further from the median than 50 times the median distance count as that far: one trajectory
    that blows up would else be the whole variance. The log density of a normal distribution reaches
    that far four times in a million draws in one dimension, and less often in more.
    """
    finite = draws[torch.isfinite(draws)].double()
    if finite.numel() < 2:
        return None
    median = finite.median()
    reach = _MAX_DISTANCE * float((finite - median).abs().median())
    if 0 < reach < math.inf:
        finite = finite.clamp(median - reach, median + reach)
    size = float(finite.abs().max())
    if size == 0:
        return None
    relative = float((finite / size).std(correction=1))
    return relative * size if relative > torch.finfo(torch.float32).eps else None


def _check_inverse_temperature(name: str, value: float) -> float:
    if not 0 < value <= 1:
        reason = ""
        if value == 0:
            reason = (
                " At 0 there is nothing to fit: the tempered density is flat (path 'joint'), or the guide "
                "has neither prior nor entropy and shrinks to a point (path 'kl_warmup'). Begin at a "
                "small number such as 0.01."
            )
        raise ValueError(f"Expected `{name}` in (0, 1]; got {value}.{reason}")
    return float(value)
