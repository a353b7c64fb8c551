"""A fit: everything that changes during it, one step, and the return to an earlier state."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_adaann.annealing.history import AnnealingHistory, Outcome
from pyro_adaann.guide_status import status_of
from pyro_adaann.objectives.base import Objective
from pyro_adaann.objectives.nonfinite import nonfinite_sites
from pyro_adaann.processes.group import equalize, on_first, process_count
from pyro_adaann.state.advice import advise_weights
from pyro_adaann.state.callable_loss import check_loss_is_tempered
from pyro_adaann.state.learned_model import warn_of_learning
from pyro_adaann.state.parameters import FitParameters
from pyro_adaann.state.recovery import MAX_REJECTED, NoFiniteStateError, SafetyNet
from pyro_adaann.state.rungs import Rung, Rungs
from pyro_adaann.state.settings import FitSettings
from pyro_adaann.state.stages import StageControl
from pyro_adaann.state.together import begin_together
from pyro_adaann.state.unfinished import warn_of_annealing_again
from pyro_adaann.steps.base import Call, Moved, Step
from pyro_adaann.steps.gradient import is_finite, to_float

__all__ = ["Fit"]


class Fit:
    """The state of a fit, and the step that changes it.

    :param model: a Pyro model.
    :param guide: its guide.
    :param step: the step that changes the parameters.
    :param settings: the settings of annealing.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], step: Step, settings: FitSettings
    ) -> None:
        self.step = step
        self.settings = settings
        self.history = AnnealingHistory()
        num_recycled_draws = settings.num_recycled_draws(step.num_draws())
        self.objective: Objective = step.make_objective(settings.path, num_recycled_draws)
        self.parameters = FitParameters(model, guide, step)
        self.net = SafetyNet(self.parameters, self.history)
        self.rungs = None if settings.ladder is None else Rungs(settings.ladder)
        self.stages = StageControl(
            settings, self.history, self.objective, self.parameters, self.net, self.rungs
        )
        self.stages.start(settings.schedule.initial_inverse_temperature)
        #: Identifies the fit in its checkpoints. Not drawn from generators that the user may have seeded.
        self.fit_id = uuid.uuid4().hex
        #: Whether all processes have the same state.
        self.is_together = False

    def take_step(self, call: Call, evaluate_loss: Callable[..., Any]) -> Any:
        """Take one step and return the loss.

        :param call: what to run.
        :param evaluate_loss: evaluates the loss without a step.
        :raises ValueError: as `AdaAnnSVI.step` does.
        """
        self._begin_together(call)
        self.stages.advance(call)
        moved, is_finite = self._take(call)
        self.parameters.step_state = moved.state
        stage = self.stages.present
        stage.count(moved.result)
        stage.num_broken, stage.num_particles = self.objective.num_broken, self.objective.num_particles
        stage.is_subsampled = self.objective.is_subsampled
        has_diverged = moved.result.outcome is Outcome.DIVERGED
        if is_finite and not has_diverged:
            self.net.accept(self.history.num_steps)
        else:
            self._recover(has_diverged, call, evaluate_loss)
        return moved.result.loss

    def _begin_together(self, call: Call) -> None:
        if not self.is_together:
            begin_together(call.model, call.guide, self.objective)
            self.fit_id = on_first(lambda: self.fit_id)
            self.is_together = True

    def _take(self, call: Call) -> tuple[Moved, bool]:
        """Take the step, and return whether the parameters are finite; all is as in the first process."""
        moved = self.step.take(
            self.objective, call, self.parameters.step_state, lambda found: self._get_ready(found, call)
        )
        is_finite = self.parameters.is_finite()
        if process_count() == 1:
            return moved, is_finite
        outcomes, tensors = list(Outcome), list(self.parameters.tensors.values())
        loss = moved.result.loss  # that of a natural step is a number, and decides about steps at 1, too
        number = loss if isinstance(loss, float) else 0.0
        outcome = float(outcomes.index(moved.result.outcome))
        index, of_first, number = equalize(tensors, outcome, float(is_finite), number)
        result = replace(
            moved.result,
            outcome=outcomes[int(index)],
            loss=number if isinstance(loss, float) else loss,
        )
        return replace(moved, result=result), bool(of_first)

    def _get_ready(self, found: dict[str, Tensor], call: Call) -> None:
        """Register the parameters before they change; before the first step, also keep the fit's state."""
        self.parameters.add(found)
        if self.net.is_set:
            return
        t = self.stages.present.inverse_temperature
        check_loss_is_tempered(self.step, call, found.values(), self.settings.path, t)
        names = self.objective.guide_names
        own = [found[name] for name in (found if names is None else names) if name in found]
        reached = max((s.inverse_temperature for s in map(status_of, own) if s is not None), default=0.0)
        if reached > t:
            warn_of_annealing_again(reached, t)
        warn_of_learning(found, names, self.settings.path, t)
        self.register_guide(own)
        self.net.keep()
        if self.rungs is not None:
            names = self.parameters.names_of_guide(call.args, call.kwargs)
            self.rungs.start(t, self.parameters.state(), names)

    def register_guide(self, parameters: Iterable[Tensor]) -> None:
        """Let draws of the guide outside of the fit warn below inverse temperature 1.

        :param parameters: those of the guide.
        """
        self.stages.tell_status()
        self.stages.status.register(self.parameters.model, self.parameters.guide, parameters)

    def _recover(self, has_diverged: bool, call: Call, evaluate_loss: Callable[..., Any]) -> None:
        """Recover from a step whose loss, gradient or parameters are not finite."""
        num_steps, t = self.history.num_steps, self.stages.present.inverse_temperature
        try:
            if not has_diverged:
                self.net.go_back(num_steps, "a parameter, or the optimizer's memory of it")
            else:
                is_hopeless = num_steps == 1 and not any(
                    is_finite((), to_float(evaluate_loss(*call.args, **call.kwargs)))
                    for _ in range(MAX_REJECTED - 1)
                )
                if not self.net.reject(num_steps, is_hopeless):
                    return
        except NoFiniteStateError as error:
            sites = nonfinite_sites(call.model, call.guide, call.args, call.kwargs)
            raise ValueError(
                f"Expected a finite loss and finite parameters; got none in {error} at inverse temperature "
                f"{t:.3g}, stage {len(self.history.stages)} (sites with a log density or gradient that is "
                f"not finite: {', '.join(sites) or 'none in the latest draw'}). The parameters are the last "
                f"good ones. Start the guide where the model has a finite density (init_loc_fn, base_loc, "
                f"base_scale) or lower the learning rate."
            ) from self.objective.leniency.error
        self.stages.go_back(self.net.inverse_temperature)

    def advise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell at the end of a run that draws need weights, if all that is random has been weighed.

        Mini-batches have no weights against all data, and with parameters of the model there is no one
        posterior.
        """
        is_weighed = (
            self.objective.is_final and bool(self.objective.memory) and not self.objective.is_subsampled
        )
        if is_weighed and set(self.parameters.tensors) <= set(self.parameters.names_of_guide(args, kwargs)):
            advise_weights(self.objective.ess_share())

    def rewind(self, rung: Rung, factor: float) -> None:
        """Anneal again from a rung, with the rung's step lengths multiplied by ``factor``.

        :raises ValueError: if the rung is not one of this fit.
        """
        if self.rungs is None or rung not in self.rungs.rungs:
            raise ValueError(
                "Expected a rung of this fit's ladder; got another one. Take one of `svi.ladder.rungs`."
            )
        self.parameters.rewind(rung.state, factor)
        self.rungs.cut(rung)
        self.stages.begin_pass(rung.inverse_temperature)
        self.net.keep()
