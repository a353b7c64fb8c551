"""The laws of a loss under annealing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI
from pyro.infer.autoguide import AutoNormal

from pyro_adaann.annealing.fixed_schedules import ConstantSchedule, LinearSchedule
from pyro_adaann.objectives.capabilities import capabilities_of
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.testing.problem import model, posterior

__all__ = ["LossLaws"]


class LossLaws:
    """The laws of a loss; a subclass defines a fixture ``make_loss``, a function that returns a new loss.

    Example::

        >>> import pytest
        >>> from pyro.infer import Trace_ELBO
        >>> class TestTrace(LossLaws):
        ...     @pytest.fixture
        ...     def make_loss(self):
        ...         return lambda: Trace_ELBO(num_particles=20, vectorize_particles=True)
    """

    #: Error allowed after the fit, in posterior sds.
    max_error = 0.35

    def make_fit(self, loss: ELBO, svi_type: Any = AdaAnnSVI, **kwargs: Any) -> Any:
        """Return a fit of two means with this loss."""
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(model, init_scale=0.5)
        return svi_type(model, guide, pyro.optim.Adam({"lr": 0.02}), loss, **kwargs)

    def test_at_one_it_is_that_of_svi_to_the_last_digit(self, make_loss: Callable[[], ELBO]) -> None:
        plain = self.make_fit(make_loss(), SVI)
        expected = [plain.step() for _ in range(4)]
        ours = self.make_fit(make_loss(), schedule=ConstantSchedule())
        assert [ours.step() for _ in range(4)] == expected

    def test_the_tempered_posterior_leads_to_the_posterior(self, make_loss: Callable[[], ELBO]) -> None:
        svi = self.make_fit(
            make_loss(),
            schedule=LinearSchedule(10, initial_inverse_temperature=0.1),
            num_initial_steps=30,
            num_steps_per_stage=5,
            num_final_steps=200,
        )
        svi.run(progress_bar=False)
        mean, sd = posterior()
        values = svi.guide.median()["z"]
        assert (values - mean).abs().max() < self.max_error * sd

    def test_the_users_object_stays_the_one_that_counts(self, make_loss: Callable[[], ELBO]) -> None:
        loss = make_loss()
        svi = self.make_fit(loss, schedule=LinearSchedule(3))
        before = set(vars(loss))
        svi.step()
        assert set(vars(loss)) == before
        assert loss.max_plate_nesting < math.inf or not loss.vectorize_particles

    def test_a_broken_draw_reaches_no_parameter(self, make_loss: Callable[[], ELBO]) -> None:
        if not capabilities_of(make_loss()).drops_broken:
            return

        def broken() -> None:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("f", torch.where(z[..., 0] > 0.5, torch.nan, 0.0))

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(broken, init_scale=1.0)
        svi = AdaAnnSVI(
            broken, guide, pyro.optim.Adam({"lr": 0.01}), make_loss(), schedule=ConstantSchedule(0.5)
        )
        with pyro.validation_enabled(False):
            losses = [svi.step() for _ in range(10)]
        assert svi.history.stages[0].num_broken > 0
        assert all(map(math.isfinite, losses))
        assert all(torch.isfinite(p).all() for p in guide.parameters())
