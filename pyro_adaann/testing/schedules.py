"""The laws of a schedule."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pyro_adaann.annealing.schedules import AnnealingSchedule

__all__ = ["ScheduleLaws"]

#: Largest number of stages that a schedule may take on draws of one spread.
_MAX_STAGES = 200_000


class ScheduleLaws:
    """The laws of a schedule; a subclass defines a fixture ``schedule``.

    Example::

        >>> import pytest
        >>> from pyro_adaann import LinearSchedule
        >>> class TestLinear(ScheduleLaws):
        ...     @pytest.fixture
        ...     def schedule(self):
        ...         return LinearSchedule(9)
    """

    #: Draws of the log factor: informative ones, outliers, and none that are finite.
    draws: tuple[list[float], ...] = (
        [-1.0, 0.0, 1.0],
        [0.0, 1e30],
        [math.inf, 0.0],
        [-math.inf, math.nan],
        [1.0, math.nan, 2.0],
        [3.0] * 5,
        [1e-300, -1e-300],
        [],
    )

    def follow(self, schedule: AnnealingSchedule, draws: list[float], max_stages: int) -> list[float]:
        """Return the inverse temperatures on the same draws at every stage."""
        values = [schedule.initial_inverse_temperature]
        while values[-1] < schedule.final_inverse_temperature and len(values) < max_stages:
            values.append(schedule.next(values[-1], draws, [0.0] * len(draws)))
        return values

    def test_rises_strictly_on_any_draws(self, schedule: AnnealingSchedule) -> None:
        for draws in self.draws:
            values = self.follow(schedule, draws, 50)
            assert all(a < b for a, b in itertools.pairwise(values)), (draws, values)
            assert all(0 < value <= 1 for value in values)

    def test_ends_at_exactly_its_end(self, schedule: AnnealingSchedule) -> None:
        final = schedule.final_inverse_temperature
        assert self.follow(schedule, [-1.0, 0.0, 1.0], _MAX_STAGES)[-1] == final
        assert schedule.next(final, [-1.0, 0.0, 1.0]) == final

    def test_is_pure(self, schedule: AnnealingSchedule) -> None:
        draws: Tensor = torch.linspace(-2.0, 3.0, 50, dtype=torch.float64)
        before, seen = repr(schedule), draws.clone()
        first, second = (self.follow(schedule, draws.tolist(), 20) for _ in range(2))
        schedule.next(schedule.initial_inverse_temperature, draws, draws)
        assert first == second
        assert repr(schedule) == before
        assert torch.equal(draws, seen)

    def test_knows_its_number_of_stages_or_says_that_draws_decide(self, schedule: AnnealingSchedule) -> None:
        if schedule.needs_log_factor:
            assert schedule.num_stages is None
        else:
            assert schedule.num_stages == len(self.follow(schedule, [], _MAX_STAGES))

    def test_two_of_the_same_settings_read_the_same(self, schedule: AnnealingSchedule) -> None:
        # A checkpoint compares schedules by their text, which must not contain an address.
        assert " at 0x" not in repr(schedule)
