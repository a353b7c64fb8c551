"""A loss of Pyro's as an objective: evaluated on the tempered model and guide, particle by particle."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from pyro.infer import ELBO
from pyro.poutine import Trace

from pyro_adaann.annealing.paths import Path
from pyro_adaann.objectives.base import Objective
from pyro_adaann.objectives.capabilities import capabilities_of, elbo_of, reads_densities_alone
from pyro_adaann.objectives.nonfinite import drop_broken, limit_gradients
from pyro_adaann.objectives.traces import traces_seen

__all__ = ["ELBOObjective"]


class ELBOObjective(Objective):
    """A loss of Pyro's on the tempered model and guide.

    The user's own object is evaluated, so attributes may be assigned between steps.

    :param loss: an ELBO or a callable ``loss(model, guide, *args, **kwargs)``.
    :param evaluate: that loss as `SVI` calls it.
    :param evaluate_and_grads: likewise, with gradients.
    :param path: the path of tempered densities.
    :param final_loss: the ELBO of the final stage, None for ``loss``.
    :param num_recycled_draws: as in :class:`~pyro_adaann.objectives.base.Objective`.
    :param max_gradient_ratio: bound on the gradient of one particle, see
        :func:`~pyro_adaann.objectives.nonfinite.limit_gradients`.
    """

    def __init__(
        self,
        loss: Any,
        evaluate: Callable[..., Any],
        evaluate_and_grads: Callable[..., Any],
        path: Path,
        final_loss: ELBO | None,
        num_recycled_draws: int,
        max_gradient_ratio: float,
    ) -> None:
        super().__init__(path, num_recycled_draws)
        self.max_gradient_ratio = max_gradient_ratio
        self.reports_loss = capabilities_of(loss).reports_loss
        self._losses = [loss, loss if final_loss is None else final_loss]
        self._calls = [(evaluate, evaluate_and_grads)] * 2
        if final_loss is not None:
            self._calls[1] = (final_loss.loss, final_loss.loss_and_grads)
        self._is_training = False

    def _elbos(self) -> list[ELBO]:
        return [loss for loss in self._losses if isinstance(loss, ELBO)]

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; call it under `torch.no_grad`."""
        with self._called("loss"):
            return self.leniency.insist(lambda: self._evaluate(False, model, guide, args, kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss and add its gradient to the parameters' ``grad``.

        If it raises an error that its leniency forgives, clear the gradients and call again.
        """
        with self._called("loss_and_grads"):
            return self._evaluate(True, model, guide, args, kwargs)

    def _evaluate(self, is_training: bool, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        self._is_training = is_training
        own = model, guide
        model, guide = self._temper(model, guide)
        before = self.num_broken, self.num_particles
        self.memory.start_step()
        loss = self._losses[self.is_final]
        elbo = elbo_of(loss)
        if self.recorder is not None and (elbo is None or not reads_densities_alone(elbo)):
            kind = type(loss if elbo is None else elbo).__name__
            self.recorder.give_up(f"a {kind}, which may read more than values and log densities")
        seen = nullcontext() if elbo is None else traces_seen(elbo, self._look, self._source(elbo, *own))
        with self.leniency.block(), seen:
            value = self._calls[self.is_final][is_training](model, guide, *args, **kwargs)
        self.memory.end_step()
        num_broken, num_particles = self.num_broken - before[0], self.num_particles - before[1]
        if not is_training:
            self.num_broken, self.num_particles = before
        # With every particle left out, the sum is empty: no loss, rather than a loss of zero.
        return math.nan if 0 < num_particles == num_broken else value

    def _look(self, model_trace: Trace, guide_trace: Trace) -> None:
        if self._is_training:
            super()._look(model_trace, guide_trace)
            limit_gradients(guide_trace, self.max_gradient_ratio)
        found = capabilities_of(self._losses[self.is_final])
        if found.drops_broken:
            num_broken, num_particles = drop_broken(
                model_trace,
                guide_trace,
                found.broken_cost if self._is_training else 0.0,
                # Not at 1 from the start, where it equals plain SVI.
                finds_lost=self._is_training and self.max_gradient_ratio < math.inf,
                drops_lost=found.drops_lost,
            )
            self.num_broken += num_broken
            # Pyro would warn of each of them, at every step.
            if num_broken:
                self.leniency.validates = False
            self.num_particles += num_particles
