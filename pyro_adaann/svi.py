"""`AdaAnnSVI`: `pyro.infer.SVI` that anneals the posterior while it fits the guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro.infer import ELBO, SVI
from pyro.optim import PyroOptim

from pyro_adaann.annealing.ladder import Ladder
from pyro_adaann.annealing.paths import Path, get_path
from pyro_adaann.annealing.schedules import AdaAnnSchedule, AnnealingSchedule
from pyro_adaann.annealing.stage_rules import StageRule
from pyro_adaann.checks import check_count
from pyro_adaann.guide_status import expects_tempered
from pyro_adaann.objectives.recorded_model import ModelRecorder
from pyro_adaann.runs import Runs
from pyro_adaann.state.arguments import check_parts, make_step
from pyro_adaann.state.fit import Fit
from pyro_adaann.state.loop_watch import LoopWatch
from pyro_adaann.state.resume import settings_of
from pyro_adaann.state.rungs import Rung, Rungs
from pyro_adaann.state.settings import FitSettings
from pyro_adaann.state.summary import html_table, summary_of
from pyro_adaann.state.unfinished import warn_of_evaluation, watch_end
from pyro_adaann.steps.base import Call, Step

__all__ = ["AdaAnnSVI"]

#: How many times as long as the median particle's gradient that of a particle may be while annealing. The
#: largest ratio among 1,000 draws of a normal posterior is 5.
_MAX_GRADIENT_RATIO = 100.0


class AdaAnnSVI(Runs, SVI):
    r"""Annealed stochastic variational inference, in place of `pyro.infer.SVI`.

    .. math:: \mathcal{L}_t(\phi) = E_{q_\phi}[\log q_\phi(z) - \log p_t(z)], \qquad
              t_0 < t_1 < \dots < t_K = 1

    A fit is a sequence of stages: ``num_initial_steps`` steps at the schedule's first
    inverse temperature, ``num_steps_per_stage`` at every following one, ``num_final_steps`` at 1.
    After that it goes on as plain SVI. :meth:`step` is one step, for an existing loop; :meth:`run` runs
    to the end. A loop of a given length needs ``num_training_steps``: if it stops before
    :attr:`inverse_temperature` is 1, the guide is one of the *tempered* posterior. A loop that neither
    gives it nor asks for :attr:`is_done` is warned at step 200, or in stage 20; draws below 1 warn, too.

    With a :class:`~pyro_adaann.NaturalStep` in place of ``optim`` and ``loss`` it takes natural-gradient
    steps; :func:`natural_svi` sets the other arguments to match.

    :param model: a Pyro model.
    :param guide: any Pyro guide that does not run the model itself.
    :param optim: a `pyro.optim.PyroOptim`, or a :class:`~pyro_adaann.NaturalStep`.
    :param loss: an ELBO of Pyro's, or a callable ``loss(model, guide, *args, **kwargs)``; none with a
        `NaturalStep`. Attributes of an ELBO may be assigned between steps.
    :param schedule: the schedule, by default :class:`~pyro_adaann.AdaAnnSchedule`.
    :param path: ``"joint"`` (the paper), ``"likelihood"``, ``"bridge"``, ``"kl_warmup"`` or a
        :class:`~pyro_adaann.Path`; :mod:`pyro_adaann.annealing.paths` describes the target of each.
    :param num_initial_steps: T0 in the paper, steps at the first inverse temperature.
    :param num_steps_per_stage: T, steps at every inverse temperature between the first and 1.
    :param num_final_steps: T1, steps at 1 before :attr:`is_done`.
    :param max_num_final_steps: most steps at 1: they go on beyond ``num_final_steps`` while the loss falls,
        that is, while the latest half of that number of losses is lower than the half before, by ranks and
        two standard errors. They end earlier, from a third of ``num_final_steps`` on, where the losses differ
        as little as those of draws of nearly equal weight. By default neither.
    :param num_final_particles: N1, particles of the ELBO at 1; by default as below 1.
    :param final_loss: another ELBO at 1, in place of ``loss`` and ``num_final_particles``.
    :param stage_rule: decides when a stage below 1 ends, after its planned number of steps
        (``num_initial_steps`` in the first stage). By default a stage ends at that number.
    :param ladder: a :class:`~pyro_adaann.Ladder`: keeps copies of the guide at a few inverse temperatures,
        from which :func:`diagnose` finds parts of the posterior that were lost while annealing.
    :param num_variance_samples: M, fresh guide draws behind each answer of the schedule. By default
        the draws of the latest training steps are used again, at no cost in model runs: those of
        one stage, and of earlier stages if they are fewer than 100.
    :param num_training_steps: how many times the user's loop will call :meth:`step`. An `AdaAnnSchedule`
        without a stage rule then plans the annealing as :meth:`run` does with ``num_steps``: it arrives at
        1 with steps left. With other settings a warning at construction says if they do not reach 1 by
        then, or that this cannot be known.
    :param lr_schedule: when :meth:`run` steps a `PyroLRScheduler`: in the ``"final"`` stage (the
        paper's way), ``"always"`` or ``"never"``. :meth:`step` leaves that to the caller, as
        `SVI.step` does.
    :param record_model: whether the model, and the guide from its latent vector on, run as the operations of
        torch that they were in the second step: the same numbers without Pyro's handlers, a third of the time
        of a step for fifteen sites. For models that do the same operations at every step, guides with one
        latent vector (`AutoContinuous`), and `Trace_ELBO`, `RenyiELBO`, `TraceMixedKL_ELBO` or natural steps.
        The record is compared with a run now and then; where that differs, or nothing can be recorded, a
        warning says why, and they run as otherwise.
    :param loss_and_grads: as in `pyro.infer.SVI`, for a callable loss.
    :param num_samples: as in `pyro.infer.SVI`, which deprecates it. `pyro.infer.Predictive` draws.
    :param num_steps: as in `pyro.infer.SVI`, which deprecates it; the same as ``num_training_steps``.
    :raises ValueError: at construction, if an argument is out of range or this loss or guide cannot
        be tempered; at the first step, before a parameter changes, if the guide has no latent site,
        the model no finite log density, or a callable loss does not depend on the inverse temperature.

    With `Trace_ELBO`, a particle whose log density is not finite ("broken") adds nothing to the loss; its
    gradient lowers the guide's mass where the log density is not finite. A step whose loss or gradient is
    not finite changes no parameter and does not count toward the length of a stage. Both are counted in
    :attr:`history`. After 20 such steps in a row, or if a parameter or the optimizer's state becomes
    infinite, the fit returns to its last good state with half the learning rate and, if the schedule
    adapts, half the increments, at most 10 times. While annealing, the gradient of one particle is clipped
    at 100 times the length of the median particle's, so that an outlier does not decide a step.

    Source: Cobian et al., *AdaAnn*, arXiv 2202.00792, Algorithm 1.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_adaann import AutoPlanar
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
        ...     pyro.sample("x", dist.Normal(z**2, 0.5), obs=torch.tensor(4.0))
        >>> pyro.clear_param_store()  # a new fit
        >>> guide = AutoPlanar(model, num_transforms=8, base_scale=2.0)
        >>> elbo = Trace_ELBO(num_particles=10, vectorize_particles=True)
        >>> svi = AdaAnnSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo,
        ...                 schedule=AdaAnnSchedule(0.5), num_initial_steps=2, num_final_steps=2)
        >>> history = svi.run(progress_bar=False)
        >>> svi.is_done, svi.inverse_temperature
        (True, 1.0)
    """

    loss: Callable[..., Any]
    loss_and_grads: Callable[..., Any]

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim | Step,
        loss: ELBO | Callable[..., Any] | None = None,
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        schedule: AnnealingSchedule | None = None,
        path: str | Path = "joint",
        num_initial_steps: int = 500,
        num_steps_per_stage: int = 5,
        num_final_steps: int = 5000,
        max_num_final_steps: int | None = None,
        num_final_particles: int | None = None,
        final_loss: ELBO | None = None,
        stage_rule: StageRule | None = None,
        ladder: Ladder | None = None,
        num_variance_samples: int | None = None,
        num_training_steps: int | None = None,
        lr_schedule: Literal["final", "always", "never"] = "final",
        record_model: bool = False,
    ) -> None:
        num_training_steps = num_steps or num_training_steps
        check_count("num_training_steps", num_training_steps, 1)
        settings = FitSettings(
            AdaAnnSchedule() if schedule is None else schedule,
            get_path(path),
            stage_rule,
            ladder,
            num_initial_steps,
            num_steps_per_stage,
            num_final_steps,
            num_variance_samples,
            lr_schedule,
            max_num_final_steps,
        )
        check_parts(model, guide, optim, loss, final_loss, settings)
        is_step = isinstance(optim, Step)
        # `SVI` requires an optimizer and a loss; a natural step has neither.
        super().__init__(
            model,
            guide,
            PyroOptim(torch.optim.SGD, {}) if is_step else optim,
            _no_loss if is_step else loss,
            loss_and_grads,
            num_samples,
            num_steps,
        )
        self.optim = optim
        self.schedule, self.path, self.stage_rule = settings.schedule, settings.path, stage_rule
        self.num_initial_steps, self.num_steps_per_stage = num_initial_steps, num_steps_per_stage
        self.num_final_steps, self.max_num_final_steps = num_final_steps, max_num_final_steps
        self.num_variance_samples = num_variance_samples
        self.lr_schedule = lr_schedule
        # A schedule that starts at 1 gives exactly the numbers of `SVI`.
        max_ratio = _MAX_GRADIENT_RATIO if self.schedule.initial_inverse_temperature < 1 else math.inf
        calls = self.loss, self.loss_and_grads
        step = make_step(optim, loss, calls, final_loss, num_final_particles, max_ratio)
        self._fit = Fit(model, guide, step, settings)
        if record_model:
            self._fit.objective.recorder = ModelRecorder()
        self.loss = self._fit.objective.loss
        self.loss_and_grads = getattr(self._fit.objective, "loss_and_grads", _no_loss)
        self._settings = settings_of(self._fit, optim, loss, getattr(step, "final_loss", None))
        self._has_warned = False
        self._loop_watch = LoopWatch(self._fit.stages)
        if num_training_steps is not None:
            self._fit.stages.plan_training(num_training_steps)
            self._loop_watch.is_asked()
        watch_end(self, self.history, self.schedule.final_inverse_temperature)

    @property
    def ladder(self) -> Rungs | None:
        """The rungs of the fit, in ``ladder.rungs``; None without a ladder."""
        return self._fit.rungs

    @property
    def num_annealing_steps(self) -> int | None:
        """Number of steps before the first one at 1; None if the schedule depends on the fit."""
        return self._fit.stages.own_plan.num_annealing(self.schedule)

    @property
    def inverse_temperature(self) -> float:
        """The inverse temperature of the latest step; before the first step, that of the first step."""
        self._loop_watch.is_asked()
        return self._fit.stages.present.inverse_temperature

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step and return the loss, a float, as `SVI.step` does.

        The loss is that of the present inverse temperature. The arguments are passed to model and guide.

        :raises ValueError: if the loss is not finite in 100 attempts, at the first step or in 100
            steps in a row, or after 10 recoveries. The parameters then are the last good ones.
        """
        self._sync_optim()
        call = Call(self.model, self.guide, args, kwargs, self.loss_and_grads, self.optim)
        with expects_tempered():
            loss: float = self._fit.take_step(call, super().evaluate_loss)
        self._loop_watch.after_step()
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss at the present inverse temperature without a step, as `SVI.evaluate_loss` does.

        Below 1 it is a loss of the tempered posterior, and the first call warns of that.
        """
        stages = self._fit.stages
        if not (stages.objective.is_final or self._has_warned):
            self._has_warned = True
            warn_of_evaluation(stages.present.inverse_temperature, self.history.num_steps)
        with expects_tempered():
            loss: float = super().evaluate_loss(*args, **kwargs)
        return loss

    def __repr__(self) -> str:
        texts = [f"{name} {value}" for name, value in summary_of(self._fit).items()]
        return f"AdaAnnSVI({', '.join(texts)})"

    def _repr_html_(self) -> str:
        return html_table("AdaAnnSVI", summary_of(self._fit))

    def restart(self, rung: Rung | None = None, *, lr_factor: float = 0.5) -> None:
        """Anneal again from the schedule's first inverse temperature, starting with the present guide.

        A number of steps planned by ``num_training_steps`` or by an earlier :meth:`run` no longer applies.

        :param rung: a rung of :attr:`ladder`: anneal again from its inverse temperature, with its parameters
            and optimizers. The rungs above it are deleted.
        :param lr_factor: with a rung, the factor on its learning rates, or on the lengths of natural steps.
            Smaller steps may keep a part of the posterior that was lost.
        :raises ValueError: if the rung is not one of this fit.

        Called whenever :attr:`is_done` is true, it makes any schedule cyclical (Fu et al., *Cyclical
        annealing schedule*, NAACL 2019). A cycle rises to 1 and stays there for ``num_final_steps`` steps::

            for epoch in range(num_epochs):
                if svi.is_done:
                    svi.restart()
                for batch in loader:
                    svi.step(batch)
        """
        if rung is None:
            self._fit.stages.begin_pass(self.schedule.initial_inverse_temperature)
        else:
            self._sync_optim()
            self._fit.rewind(rung, lr_factor)


def _no_loss(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "Expected a call of `AdaAnnSVI.step`, since a natural step has no loss of its own; got another."
    )
