"""The laws of a step."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_adaann.annealing.fixed_schedules import ConstantSchedule, LinearSchedule
from pyro_adaann.steps.base import Step
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.testing.problem import model, posterior

__all__ = ["StepLaws"]


class StepLaws:
    """The laws of a step; a subclass defines a fixture ``step``.

    Example::

        >>> import pytest
        >>> from pyro_adaann import NaturalStep
        >>> class TestNatural(StepLaws):
        ...     @pytest.fixture
        ...     def step(self):
        ...         return NaturalStep(100)
    """

    #: Number of steps of the fit of two means, and the error allowed after them, in posterior sds.
    num_steps, max_error = 60, 0.1

    def guide(self) -> None:
        """A normal guide, whose parameters start away from the posterior."""
        loc = pyro.param("loc", torch.zeros(2))
        log_scale = pyro.param("log_scale", torch.zeros(2))
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def make_fit(self, step: Step, **kwargs: Any) -> AdaAnnSVI:
        """Return a fit of the two means by this step."""
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return AdaAnnSVI(model, self.guide, step, **{"schedule": ConstantSchedule(), **kwargs})

    def values(self) -> dict[str, Tensor]:
        """Return the parameters."""
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    def test_finds_the_posterior(self, step: Step) -> None:
        self.make_fit(step, num_final_steps=self.num_steps).run(progress_bar=False)
        mean, sd = posterior()
        values = self.values()
        assert (values["loc"] - mean).abs().max() < self.max_error * sd
        assert (values["log_scale"].exp() / sd - 1).abs().max() < self.max_error

    def test_settings_never_change(self, step: Step) -> None:
        before, start = repr(step), step.start()
        svi = self.make_fit(step)
        for _ in range(3):
            svi.step()
        assert repr(step) == before
        assert step.start() == start

    def test_the_state_is_numbers_and_slows_down(self, step: Step) -> None:
        state = step.start()
        assert all(isinstance(value, float) for value in state.values())
        assert step.slow_down(state, 1.0) == state
        assert step.start() == state

    def test_a_fit_resumed_goes_on_bit_for_bit(self, step: Step, tmp_path: Any) -> None:
        options = {"schedule": LinearSchedule(3), "num_initial_steps": 2, "num_steps_per_stage": 2}
        svi = self.make_fit(step, **options)
        for _ in range(5):
            svi.step()
        svi.save_checkpoint(tmp_path / "fit")
        expected = [svi.step() for _ in range(4)], self.values()
        again = self.make_fit(step, **options)
        again.load_checkpoint(tmp_path / "fit")
        assert [again.step() for _ in range(4)] == expected[0]
        assert all(torch.equal(value, expected[1][name]) for name, value in self.values().items())

    def test_a_density_that_is_never_finite_changes_no_parameter(self, step: Step) -> None:
        def broken() -> None:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("f", z.sum(-1) * torch.nan)

        pyro.clear_param_store()
        svi = AdaAnnSVI(broken, self.guide, step, schedule=ConstantSchedule())
        self.guide()
        before = self.values()
        with pyro.validation_enabled(False), pytest.raises(ValueError, match="Expected a finite loss"):
            svi.step()
        assert all(torch.equal(value, before[name]) for name, value in self.values().items())
