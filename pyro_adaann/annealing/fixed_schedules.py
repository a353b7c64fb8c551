"""Schedules that are fixed in advance: they read no draws and cost no model evaluation.

Each of them becomes cyclical (Fu et al., *Cyclical annealing schedule*, NAACL 2019) with `AdaAnnSVI.restart`
at the end of every cycle. With one inverse temperature per epoch, and two epochs at 1::

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_adaann import AdaAnnSVI
    >>> pyro.clear_param_store()
    >>> loader = torch.utils.data.DataLoader(torch.randn(100) + 3, batch_size=25, shuffle=True)
    >>> def model(batch):
    ...     z = pyro.sample("z", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", 100, subsample=batch):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=batch)
    >>> optim = pyro.optim.Adam({"lr": 0.01})
    >>> svi = AdaAnnSVI(model, AutoNormal(model), optim, Trace_ELBO(), path="likelihood",
    ...                 schedule=LinearSchedule(2, initial_inverse_temperature=0.5),
    ...                 num_initial_steps=len(loader), num_steps_per_stage=len(loader),
    ...                 num_final_steps=2 * len(loader))
    >>> inverse_temperatures = []
    >>> for epoch in range(9):
    ...     if svi.is_done:
    ...         svi.restart()
    ...     for batch in loader:
    ...         loss = svi.step(batch)
    ...     inverse_temperatures.append(svi.inverse_temperature)
    >>> inverse_temperatures
    [0.5, 0.75, 1.0, 1.0, 0.5, 0.75, 1.0, 1.0, 0.5]
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from pyro_adaann.annealing.schedules import AnnealingSchedule
from pyro_adaann.checks import check_count

__all__ = ["ConstantSchedule", "CosineSchedule", "LinearSchedule", "SequenceSchedule"]


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
        check_count("num_increments", num_increments, 1)
        self.num_increments = num_increments

    @property
    def num_stages(self) -> int | None:
        """Number of inverse temperatures, both ends included."""
        return self.num_increments + 1 if self.initial_inverse_temperature < 1 else 1

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        # Through the index, so that rounding errors do not add up over thousands of increments.
        start = self.initial_inverse_temperature
        step = (1 - start) / self.num_increments
        index = math.floor((inverse_temperature - start) / step + 1e-6) + 1
        return 1.0 if index >= self.num_increments else start + index * step


class CosineSchedule(AnnealingSchedule):
    r"""Half a cosine wave, flat at both ends, for j = 0, ..., K.

    .. math:: t_j = t_0 + (1 - t_0) \, \tfrac12 \left(1 - \cos \frac{\pi j}{K}\right)

    :param num_increments: K >= 1.
    :param initial_inverse_temperature: :math:`t_0` in (0, 1].
    :raises ValueError: if K is not an integer >= 1.

    Source: Fu et al., *Cyclical annealing schedule*, NAACL 2019, where it is one of the shapes.

    Example::

        >>> schedule = CosineSchedule(num_increments=2, initial_inverse_temperature=0.2)
        >>> round(schedule.next(0.2), 12), schedule.next(0.6)
        (0.6, 1.0)
    """

    def __init__(self, num_increments: int, *, initial_inverse_temperature: float = 0.01) -> None:
        super().__init__(initial_inverse_temperature)
        check_count("num_increments", num_increments, 1)
        self.num_increments = num_increments

    @property
    def num_stages(self) -> int | None:
        """Number of inverse temperatures, both ends included."""
        return self.num_increments + 1 if self.initial_inverse_temperature < 1 else 1

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        # Through the index, as in LinearSchedule; sin^2 of half the angle keeps its digits where the
        # cosine is flat.
        start, num_increments = self.initial_inverse_temperature, self.num_increments
        share = min(max((inverse_temperature - start) / (1 - start), 0.0), 1.0)
        index = math.floor(2 * math.asin(math.sqrt(share)) * num_increments / math.pi + 1e-6) + 1
        rise = math.sin(0.5 * math.pi * index / num_increments) ** 2
        return 1.0 if index >= num_increments else start + (1 - start) * rise


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
        if any(not a < b for a, b in itertools.pairwise(values)):
            raise ValueError(f"Expected strictly increasing inverse temperatures; got {values}.")
        if values[-1] != 1.0:
            raise ValueError(
                f"Expected the last inverse temperature to be 1, where the posterior is; got "
                f"{values[-1]}. Append 1.0, or use ConstantSchedule to stay at one temperature."
            )
        self.inverse_temperatures = values

    @property
    def num_stages(self) -> int | None:
        """Number of inverse temperatures, both ends included."""
        return len(self.inverse_temperatures)

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        index = bisect.bisect_right(self.inverse_temperatures, inverse_temperature)
        return self.inverse_temperatures[index]


class ConstantSchedule(AnnealingSchedule):
    """One inverse temperature from the first step to the last.

    At 1 (the default) nothing is annealed: `AdaAnnSVI` then gives the numbers of `pyro.infer.SVI`. Below 1
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

    @property
    def num_stages(self) -> int | None:
        """Number of inverse temperatures, which is 1."""
        return 1

    def propose(self, inverse_temperature: float, log_factor: Tensor | None) -> float:
        return self.initial_inverse_temperature
