r"""Annealing schedules: which inverse temperature comes after which.

A schedule is a pure function. The driver calls it at the end of a stage, outside the training loop::

    inverse_temperature = schedule.next(inverse_temperature, log_factor)

The answers are strictly increasing and finite and end at exactly 1, whatever the ``log_factor`` draws are:
:meth:`AnnealingSchedule.next` ensures this for every schedule.

To write another, subclass :class:`AnnealingSchedule`, implement :meth:`~AnnealingSchedule.propose`
and, if it reads the draws, set ``needs_log_factor = True``::

    class GeometricSchedule(AnnealingSchedule):
        def __init__(self, factor, *, initial_inverse_temperature=0.01):
            super().__init__(initial_inverse_temperature)
            self.factor = factor

        def propose(self, inverse_temperature, log_factor):
            return self.factor * inverse_temperature

A schedule does not count steps. For one inverse temperature per step, per 100 steps
or per epoch, give the driver ``num_steps_per_stage`` = 1, 100 or the number of mini-batches,
``len(loader)``, and ``num_initial_steps`` likewise; ``LinearSchedule(10)`` then warms up for 10 epochs.
For a cyclical schedule call `AdaAnnSVI.restart` at the end of every cycle: each cycle rises to exactly 1, and
schedules need no state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.weights import standard_deviation

__all__ = ["AdaAnnSchedule", "AnnealingSchedule"]

#: Of a schedule whose inverse temperatures are counted.
_MAX_STAGES = 1_000_000


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

    @property
    def num_stages(self) -> int | None:
        """Number of inverse temperatures, both ends included.

        None if it depends on draws, and above a million.
        """
        if self.needs_log_factor:
            return None
        inverse_temperature = self.initial_inverse_temperature
        for count in range(1, _MAX_STAGES + 1):
            if inverse_temperature >= self.final_inverse_temperature:
                return count
            inverse_temperature = self.next(inverse_temperature)
        return None

    @abstractmethod
    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        """Return the next inverse temperature, not necessarily a legal one.

        :param inverse_temperature: the current one, below the final one.
        :param log_factor: draws of d/dt log p_t under the guide, float64, shape ``(num_draws,)``;
            possibly none, possibly not finite. None if ``needs_log_factor`` is false.
        """

    def propose_weighted(self, inverse_temperature: float, log_factor: Tensor, log_weight: Tensor) -> float:
        """Return :meth:`propose` for weighted draws; by default the weights are not used.

        :param inverse_temperature: as there, and so is ``log_factor``.
        :param log_weight: log p_t - log q of every draw, up to a constant, float64.
        """
        return self.propose(inverse_temperature, log_factor)

    def next(self, inverse_temperature: float, log_factor: Any = None, log_weight: Any = None) -> float:
        """Return the inverse temperature that follows, strictly larger unless it is the final one.

        :param inverse_temperature: the current one, in (0, 1].
        :param log_factor: draws of the log factor under the guide, any shape, or None.
        :param log_weight: log weights of the same draws, or None for draws of the tempered density.
        :raises ValueError: if the inverse temperature is outside (0, 1], or draws are needed and
            none were given.
        """
        current = _check_inverse_temperature("inverse_temperature", inverse_temperature)
        final = self.final_inverse_temperature
        if current >= final:
            return final
        if self.needs_log_factor and log_factor is None:
            raise ValueError(
                f"Expected draws of the log factor, which {type(self).__name__} reads; got None."
            )
        if not self.needs_log_factor:
            proposal = self.propose(current, None)
        elif log_weight is None:
            proposal = self.propose(current, _flat(log_factor))
        else:
            proposal = self.propose_weighted(current, _flat(log_factor), _flat(log_weight))
        proposal = float(proposal)
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

    The sd (with the number of draws minus one in the denominator) is that of the finite draws, winsorized
    (:func:`standard_deviation`). If they determine none (fewer than two draws, or all equal to rounding), the
    increment is that of a two-dimensional normal posterior, :math:`\tau t`, with at most 0.1 for
    :math:`\tau`, so that annealing neither jumps nor stops. An increment is at least 0.1 % of
    :math:`\tau t`, that of a normal posterior in two million dimensions, so that a few outliers cannot stall
    annealing.

    **Mini-batches.** Where the arguments of a step are a mini-batch of B of N data, log p is that of the
    batch as the model's plates scale it, and the sd is over particles that share the batch: the draws of
    a training step are compared only with each other, and fresh ones (``num_variance_samples``) all see
    the batch of the step that asks. For global latent variables and a plate scaled to N data that is an
    estimate of the sd on all data. For local ones (a VAE) log p is a sum of independent terms: the sd of a
    batch is :math:`\sqrt{B/N}` times that of all data if the plate is not scaled, and
    :math:`\sqrt{N/B}` times if it is. So one tolerance means another KL divergence there, of the batch.
    A training step with one particle has no spread of its own: then give ``num_variance_samples``, or
    the noise between batches counts too and the steps are too short. For amortized guides we recommend
    a fixed schedule; the tempered posterior moves with the model anyway.

    :param tolerance: :math:`\tau` > 0. The paper uses 0.005 to 0.01 for multimodal posteriors and 0.5 for
        a unimodal one; 1 loses modes.
    :param initial_inverse_temperature: the first inverse temperature, in (0, 1].
    :param weighted: whether to take the sd under the tempered density itself, as in the theorem, by weighting
        the draws, instead of the sd under the guide. An increment is then at most t, since with uneven
        weights few draws decide it.
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

    def __init__(
        self,
        tolerance: float = 0.01,
        *,
        initial_inverse_temperature: float = 0.01,
        weighted: bool = False,
    ) -> None:
        super().__init__(initial_inverse_temperature)
        if not 0 < tolerance < math.inf:
            raise ValueError(f"Expected `tolerance` > 0; got {tolerance}.")
        self.tolerance = float(tolerance)
        self.weighted = weighted

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        return self._propose(inverse_temperature, log_factor, None)

    def propose_weighted(self, inverse_temperature: float, log_factor: Tensor, log_weight: Tensor) -> float:
        return self._propose(inverse_temperature, log_factor, log_weight if self.weighted else None)

    def _propose(self, t: float, log_factor: Tensor | None, log_weight: Tensor | None) -> float:
        assert log_factor is not None  # `next` has checked
        sd = standard_deviation(log_factor, log_weight)
        normal_increment = self.tolerance * t
        if sd is None:
            increment = min(self.tolerance, 0.1) * t
        else:
            increment = max(self.tolerance / sd, 0.001 * normal_increment)
        if self.weighted:
            increment = min(increment, t)
        return t + increment


def _flat(draws: Any) -> Tensor:
    # A few hundred numbers, once a stage, of which schedules ask dozens of questions: copied to the CPU once,
    # they wait for a graphics card once. Lists have no device.
    draws = draws.detach().cpu() if isinstance(draws, Tensor) else draws
    return torch.as_tensor(draws, dtype=torch.float64, device="cpu").flatten()


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
