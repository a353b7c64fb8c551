"""`AdaAnnSVI`: `pyro.infer.SVI` that anneals the posterior while it fits the guide."""

from __future__ import annotations

import math
import os
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import pyro
import pyro.infer.util
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_adaann.annealing.history import AnnealingHistory, AnnealingStage
from pyro_adaann.annealing.paths import Path, get_path
from pyro_adaann.annealing.schedules import AdaAnnSchedule, AnnealingSchedule
from pyro_adaann.annealing.stage_rules import StageRule
from pyro_adaann.checks import check_count
from pyro_adaann.objectives.objective import Objective, spread_within_steps
from pyro_adaann.objectives.traces import captured_parameters
from pyro_adaann.state.budget import StepPlan, next_within_budget, plan_steps, projected_num_steps
from pyro_adaann.state.checkpoint import (
    CheckpointKeeper,
    get_random_states,
    read_checkpoint,
    set_random_states,
    write_checkpoint,
)
from pyro_adaann.state.checks import (
    check_ladder,
    check_parts,
    check_stage_rule,
    choose_final_loss,
    is_finite,
    nonfinite_sites,
    to_float,
)
from pyro_adaann.state.endings import announce_short_training, count_annealing_steps, watch_end
from pyro_adaann.state.interrupt import InterruptGuard
from pyro_adaann.state.parameters import FitParameters
from pyro_adaann.state.progress import ProgressBar
from pyro_adaann.state.recovery import MAX_REJECTED, RECOVERY_FACTOR, HopelessFit, SafetyNet
from pyro_adaann.state.resume import fit_state, restore_fit, settings_of
from pyro_adaann.state.rungs import Ladder, Rung
from pyro_adaann.weights import standard_deviation

__all__ = ["AdaAnnSVI"]

#: More stages than this are absurd (the paper's longest run has 4,645), and when that can be told.
_MAX_STAGES = 50_000
_NUM_STAGES_TO_PROJECT = 20
#: How much longer than the median particle's a particle's gradient may be while annealing. Far out of
#: the way of a healthy fit: the steepest of 1,000 draws of a normal posterior has a ratio of 5.
_MAX_GRADIENT_RATIO = 100.0


class AdaAnnSVI(SVI):
    r"""Annealed stochastic variational inference, in place of `pyro.infer.SVI`.

    .. math:: \mathcal{L}_t(\phi) = E_{q_\phi}[\log q_\phi(z) - \log p_t(z)], \qquad
              t_0 < t_1 < \dots < t_K = 1

    A fit is a sequence of stages: ``num_initial_steps`` optimizer steps at the schedule's first
    inverse temperature, ``num_steps_per_stage`` at every following one, ``num_final_steps`` at 1.
    After that it goes on as plain SVI. :meth:`step` is one optimizer step, so an existing loop works
    unchanged; :meth:`run` runs to the end. A loop that stops before :attr:`inverse_temperature` is 1
    leaves a guide of the *tempered* posterior.

    :param model: a Pyro model.
    :param guide: any Pyro guide that runs apart from the model; flow guides gain most.
    :param optim: a `pyro.optim.PyroOptim`.
    :param loss: an ELBO of Pyro's, or a callable ``loss(model, guide, *args, **kwargs)``.
    :param schedule: the schedule, by default :class:`~pyro_adaann.AdaAnnSchedule`.
    :param path: ``"joint"`` (the paper), ``"likelihood"``, ``"bridge"``, ``"kl_warmup"`` or a
        :class:`~pyro_adaann.Path`; :mod:`pyro_adaann.annealing.paths` says what each of them targets.
    :param num_initial_steps: T0 in the paper, steps at the first inverse temperature.
    :param num_steps_per_stage: T, steps at every inverse temperature between the first and 1.
    :param num_final_steps: T1, steps at 1 before :attr:`is_done`.
    :param num_final_particles: N1, particles of the ELBO at 1; by default its own number.
    :param final_loss: another ELBO at 1, in place of ``loss`` and ``num_final_particles``.
    :param stage_rule: when a stage below 1 ends, once it has its number of steps; by default then. The
        first stage then has ``num_initial_steps`` at least.
    :param ladder: keeps the guide at a few inverse temperatures, by which :func:`diagnose` sees whether a
        mode was lost on the way.
    :param num_variance_samples: M, fresh guide draws behind each answer of the schedule. By default
        the draws of the latest training steps are used again, which costs no model run: those of
        one stage, and of the stages before it where they are fewer than 100.
    :param num_training_steps: how many times the user's loop will call :meth:`step`, if that is known:
        a warning at construction says if the schedule does not reach 1 by then. Whether given or not,
        a training that ends below 1 is logged when the driver goes out of use.
    :param lr_schedule: when :meth:`run` steps a `PyroLRScheduler`: in the ``"final"`` stage (the
        paper's way), ``"always"`` or ``"never"``. :meth:`step` leaves that to the caller, as
        `SVI.step` does.
    :param loss_and_grads: as in `pyro.infer.SVI`, for a callable loss.
    :raises ValueError: at construction, if an argument is out of range or this loss or guide cannot
        be tempered; at the first step, before a parameter changes, if the guide has no latent site
        or the model no finite log density.

    With `Trace_ELBO`, a particle whose log density is not finite adds nothing to the loss, and to the
    update only a push out of the broken region. A loss
    or gradient that is not finite changes no parameter. Both are counted in :attr:`history`. After 20
    such steps in a row, or where a parameter or the optimizer's memory has become infinite, the fit
    returns to its last good state with half the learning rate and increments, at most 10 times. While
    annealing, the gradient of one particle is at most 100 times as long as the median particle's,
    so that one absurd draw does not set the course.

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
        optim: PyroOptim,
        loss: ELBO | Callable[..., Any],
        *,
        schedule: AnnealingSchedule | None = None,
        path: str | Path = "joint",
        num_initial_steps: int = 500,
        num_steps_per_stage: int = 5,
        num_final_steps: int = 5000,
        num_final_particles: int | None = None,
        final_loss: ELBO | None = None,
        stage_rule: StageRule | None = None,
        ladder: Ladder | None = None,
        num_variance_samples: int | None = None,
        num_training_steps: int | None = None,
        lr_schedule: Literal["final", "always", "never"] = "final",
        loss_and_grads: Callable[..., Any] | None = None,
    ) -> None:
        path = get_path(path)
        schedule = AdaAnnSchedule() if schedule is None else schedule
        check_parts(guide, optim, loss, schedule, path)
        check_stage_rule(stage_rule, loss, path)
        check_ladder(ladder, path)
        check_count("num_initial_steps", num_initial_steps, 0)
        check_count("num_steps_per_stage", num_steps_per_stage, 1)
        check_count("num_final_steps", num_final_steps, 1)
        check_count("num_variance_samples", num_variance_samples, 2)
        check_count("num_training_steps", num_training_steps, 1)
        final_loss = choose_final_loss(loss, final_loss, num_final_particles)
        if lr_schedule not in ("final", "always", "never"):
            raise ValueError(
                f"Expected `lr_schedule` to be 'final', 'always' or 'never'; got {lr_schedule!r}."
            )
        super().__init__(model, guide, optim, loss, loss_and_grads)
        self.schedule = schedule
        self.path = path
        self.stage_rule = stage_rule
        #: The :class:`~pyro_adaann.Ladder` of the fit, or None.
        self.ladder = ladder
        self.num_initial_steps = num_initial_steps
        self.num_steps_per_stage = num_steps_per_stage
        self.num_final_steps = num_final_steps
        self.num_variance_samples = num_variance_samples
        self.lr_schedule = lr_schedule
        #: The :class:`~pyro_adaann.AnnealingHistory` of the fit so far.
        self.history = AnnealingHistory()

        num_recycled_draws = 0
        if (schedule.needs_log_factor and num_variance_samples is None) or stage_rule is not None:
            num_recycled_draws = num_steps_per_stage * getattr(loss, "num_particles", 1)
            num_recycled_draws = max(num_recycled_draws, 100 if stage_rule is None else 500)
        self._objective = Objective(
            loss,
            self.loss,
            self.loss_and_grads,
            path,
            final_loss,
            num_recycled_draws,
            # At 1 from the start it is plain SVI, to the last digit.
            _MAX_GRADIENT_RATIO if schedule.initial_inverse_temperature < 1 else math.inf,
        )
        self.loss = self._objective.loss
        self.loss_and_grads = self._objective.loss_and_grads
        self._start_stage(schedule.initial_inverse_temperature)
        self._num_steps = 0
        self._parameters = FitParameters(guide, optim)
        self._safety_net = SafetyNet(self._parameters, self.history)
        self._guide_names: list[str] | None = None
        self._budget: StepPlan | None = None
        self._settings = settings_of(self, loss, final_loss)
        # Not of Python's generators, which the user may have seeded.
        self._fit_id = uuid.uuid4().hex
        announce_short_training(self.num_annealing_steps, num_training_steps)
        watch_end(self)

    @property
    def num_annealing_steps(self) -> int | None:
        """Number of steps before the first one at 1; None if the schedule depends on the fit."""
        return count_annealing_steps(self.schedule, self.num_initial_steps, self.num_steps_per_stage)

    @property
    def inverse_temperature(self) -> float:
        """The inverse temperature of the latest step; before the first step, of that one."""
        return self.history.stages[-1].inverse_temperature

    @property
    def is_done(self) -> bool:
        """Whether annealing has ended and ``num_final_steps`` steps have followed, or the budget is used."""
        if self._plan.num_total is not None:
            return self._num_steps >= self._plan.num_total
        return self._objective.is_final and self._stage.num_steps >= self.num_final_steps

    @property
    def _stage(self) -> AnnealingStage:
        return self.history.stages[-1]

    @property
    def _plan(self) -> StepPlan:
        own = StepPlan(self.num_initial_steps, self.num_steps_per_stage, self.num_final_steps)
        return self._budget or own

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one optimizer step and return the loss, a float, as `SVI.step` does.

        The loss is that of the present inverse temperature. The arguments go to model and guide.

        :raises ValueError: if the loss is not finite in 100 attempts, at the first step or in 100
            steps in a row, or after 10 recoveries. The parameters then are the last good ones.
        """
        self._advance(args, kwargs)
        try:
            loss, found = self._loss_and_params(args, kwargs)
        except ValueError as error:
            if not self._objective.forgives(error):
                raise
            loss, found = self._loss_and_params(args, kwargs)
        params = set(found.values())
        loss = to_float(loss)
        is_accepted = is_finite(params, loss if self._objective.reports_loss else 0.0)
        if is_accepted:
            if not self._safety_net.is_set:
                self._safety_net.keep()
                if self.ladder is not None:
                    names = self._get_guide_names(args, kwargs)
                    self.ladder.start(self.inverse_temperature, self._parameters.state(), names)
            self.optim(params)
        pyro.infer.util.zero_grads(params)
        self._count(loss)
        if is_accepted and self._parameters.is_finite():
            self._safety_net.accept(self._num_steps)
        else:
            self._recover(is_accepted, args, kwargs)
        return loss

    def run(
        self,
        *args: Any,
        progress_bar: bool = True,
        num_steps: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | timedelta = timedelta(minutes=5),
        **kwargs: Any,
    ) -> AnnealingHistory:
        """Anneal and refine until :attr:`is_done`; return the :attr:`history`.

        Ctrl-C ends the run after the present step, with a warning; `run` again goes on from there.

        :param args: arguments of model and guide, as ``kwargs``.
        :param progress_bar: whether to show inverse temperature, stage, loss, rate and the projected
            end.
        :param num_steps: total number of steps, those taken already included. An `AdaAnnSchedule`
            then chooses its tolerance at every stage so that ``num_final_steps`` of them are left at
            1 (both ends are shortened if less than 50 stages would be left). For another schedule
            the steps at 1 are what is left.
        :param checkpoint: a file. If it exists and this fit has taken no step, the fit goes on from
            it, bit for bit: the same script, started again after a crash, finishes the run.
        :param checkpoint_every: how often to write it, in steps or as a `timedelta`. It is also
            written at the end. Where the disk refuses there is a warning and the run goes on.
        :raises ValueError: if an argument is out of range, if the file cannot be used
            (:meth:`load_checkpoint`) or is another fit's, and as :meth:`step` does.
        """
        if num_steps is not None:
            own = StepPlan(self.num_initial_steps, self.num_steps_per_stage, self.num_final_steps)
            if self.stage_rule is not None:
                raise ValueError(
                    "Expected `num_steps` to be None with a stage rule, which decides how long a stage "
                    f"is; got {num_steps}. Leave one of them out."
                )
            self._budget = plan_steps(self.schedule, own, num_steps)
        keeper = None
        if checkpoint is not None:
            keeper = CheckpointKeeper(checkpoint, checkpoint_every, lambda: self._state())
            self._resume(checkpoint, args, kwargs)
        bar = ProgressBar(self.history, self.schedule, self._plan, progress_bar)
        with InterruptGuard() as interrupt, bar:
            try:
                while not (self.is_done or interrupt.requested):
                    loss = self.step(*args, **kwargs)
                    self._step_lr_scheduler(loss)
                    bar.update()
                    if keeper is not None:
                        keeper.step(self._num_steps)
            except KeyboardInterrupt:
                pyro.infer.util.zero_grads(self._parameters.tensors.values())
            finally:
                if keeper is not None and self._num_steps:
                    keeper.write(self._num_steps)
        if not self.is_done:
            warnings.warn(
                f"The run was interrupted at inverse temperature {self.inverse_temperature:.3g}, after "
                f"{self._num_steps} steps. Call `run` again to go on.",
                stacklevel=2,
            )
        return self.history

    def restart(self, rung: Rung | None = None, *, lr_factor: float = 0.5) -> None:
        """Anneal once more from the schedule's first inverse temperature, with the guide as it is.

        :param rung: a rung of :attr:`ladder`: anneal once more from there, with parameters and optimizers
            as they were then. The rungs above it are forgotten.
        :param lr_factor: with a rung, what the learning rates of then are multiplied by: where a mode was
            lost, smaller steps may keep it.
        :raises ValueError: if the rung is not one of this fit.

        This makes every schedule a cyclical one (Fu et al., *Cyclical annealing schedule*, NAACL 2019).
        A cycle rises to 1 and stays there for ``num_final_steps`` steps::

            for epoch in range(num_epochs):
                if svi.is_done:
                    svi.restart()
                for batch in loader:
                    svi.step(batch)
        """
        if rung is None:
            self._start_stage(self.schedule.initial_inverse_temperature)
            return
        if self.ladder is None or rung not in self.ladder.rungs:
            raise ValueError(
                "Expected a rung of this fit's ladder; got another one. Take one of `svi.ladder.rungs`."
            )
        self._parameters.optim = self.optim
        self._parameters.rewind(rung.state, lr_factor)
        self.ladder.cut(rung)
        self._safety_net.keep()
        self._start_stage(rung.inverse_temperature)

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write all that decides how the fit goes on to one file, whole or not at all.

        :raises OSError: if the disk refuses; what was at ``path`` is still there.
        """
        write_checkpoint(path, self._state())

    def load_checkpoint(self, path: str | os.PathLike[str], /, *args: Any, **kwargs: Any) -> None:
        """Bring the fit to the state in a file of :meth:`save_checkpoint` or :meth:`run`.

        The next steps then give what they would have given in the fit that wrote it, bit for bit
        with the same versions on the same machine: the random states are part of it. The file is
        read without running code from it.

        :param args: arguments of model and guide, as ``kwargs``; both run once.
        :raises ValueError: if the file is damaged, foreign, newer, or of another model, guide or
            other settings. The fit is then what it was.
        """
        state = read_checkpoint(path)
        self._parameters.optim = self.optim
        restore_fit(self, state, args, kwargs)
        if state["budget"] is not None and self._budget is None:
            self._budget = StepPlan(**state["budget"])
        self._num_steps = self.history.num_steps
        self._safety_net.keep()

    def _resume(self, path: str | os.PathLike[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not os.path.exists(path):
            return
        if not self._num_steps:
            self.load_checkpoint(path, *args, **kwargs)
        elif read_checkpoint(path)["fit_id"] != self._fit_id:
            raise ValueError(
                f"Expected a checkpoint file of this fit, which has taken {self._num_steps} steps; got "
                f"{os.fspath(path)!r} of another one. Give another path, or go on from the file with a "
                f"new AdaAnnSVI."
            )

    def _state(self) -> dict[str, Any]:
        # A resumed fit has this state as its last good one; so must the one that goes on.
        self._parameters.optim = self.optim
        if self._safety_net.is_set:
            self._safety_net.keep()
        return fit_state(self)

    def _loss_and_params(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return the loss and the parameters it has met, which hold its gradient."""
        self._parameters.optim = self.optim
        with poutine.trace(param_only=True) as capture:
            try:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
                self._parameters.meet(captured_parameters(capture.trace))
            except ValueError:
                # Particles before the one at fault may have left their gradients.
                pyro.infer.util.zero_grads(captured_parameters(capture.trace).values())
                raise
        return loss, captured_parameters(capture.trace)

    def _get_guide_names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Return the names of the parameters that the guide alone has, not those of the model."""
        if self._guide_names is None:
            random = get_random_states()  # a resumed fit looks too, at another time
            with poutine.trace(param_only=True) as capture, torch.no_grad():
                self.guide(*args, **kwargs)
            set_random_states(random)
            self._guide_names = list(captured_parameters(capture.trace))
        return self._guide_names

    def _advance(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start the next stage if the present one has all its steps.

        At the start of a step and not at the end of the one before, so that `inverse_temperature` is
        always the one at which the guide has been trained.
        """
        stage, plan = self._stage, self._plan
        is_first = stage.inverse_temperature == self.schedule.initial_inverse_temperature
        length = plan.num_initial if is_first else plan.num_per_stage
        if self._objective.is_final or stage.num_steps < length:
            return
        if self.stage_rule is not None:
            ess = self._objective.ess()
            if not self.stage_rule.is_over(stage.num_steps, ess):
                return
            stage.is_tracked = self.stage_rule.is_met(ess)
        draws = weights = None
        if self.schedule.needs_log_factor:
            steps = self._objective.draw_log_factors(
                self.num_variance_samples, self.model, self.guide, args, kwargs
            )
            stage.record(*torch.cat(steps, dim=1))
            draws = spread_within_steps([factors for factors, _ in steps])
            weights = torch.cat([weights for _, weights in steps])
            stage.log_factor_sd = standard_deviation(draws)  # what the schedule sees
        t = stage.inverse_temperature
        following = next_within_budget(self.schedule, plan, self.history, draws, weights)
        if self.history.recoveries and plan.num_total is None:
            factor = RECOVERY_FACTOR ** len(self.history.recoveries)
            following = max(t + factor * (following - t), math.nextafter(t, math.inf))
        if self.ladder is not None and self.ladder.is_due(stage, following):
            self.ladder.climb(t, self._parameters.state(), self._get_guide_names(args, kwargs))
        self._start_stage(following)
        if len(self.history.stages) == _NUM_STAGES_TO_PROJECT:
            self._warn_if_endless()

    def _start_stage(self, inverse_temperature: float) -> None:
        self.history.stages.append(AnnealingStage(inverse_temperature))
        is_final = inverse_temperature >= self.schedule.final_inverse_temperature
        self._objective.start_stage(inverse_temperature, is_final=is_final)

    def _warn_if_endless(self) -> None:
        projected = projected_num_steps(self.history, self.schedule, self._plan)
        limit = _MAX_STAGES * self.num_steps_per_stage + self.num_final_steps
        if self._plan.num_total is None and projected is not None and projected > limit:
            warnings.warn(
                f"At this rate annealing takes about {projected:,} steps; it has come to inverse "
                f"temperature {self.inverse_temperature:.3g} in {self._num_steps:,}. Give `run` a number of "
                f"steps (num_steps) or the schedule a larger tolerance.",
                stacklevel=3,
            )

    def _count(self, loss: Any) -> None:
        self._num_steps += 1
        stage = self._stage
        stage.losses.append(loss[0] if isinstance(loss, tuple) else loss)
        stage.num_broken = self._objective.num_broken
        stage.num_particles = self._objective.num_particles

    def _recover(self, was_accepted: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Deal with a step after which loss, gradient or parameters are not finite."""
        net, t = self._safety_net, self.inverse_temperature
        try:
            if was_accepted:
                net.go_back(self._num_steps, "a parameter, or the optimizer's memory of it")
            else:
                is_hopeless = self._num_steps == 1 and not self._finds_finite_loss(args, kwargs)
                if not net.reject(self._num_steps, is_hopeless):
                    return
        except HopelessFit as error:
            sites = nonfinite_sites(self.model, self.guide, args, kwargs)
            raise ValueError(
                f"Expected a finite loss and finite parameters; got none in {error} at inverse temperature "
                f"{t:.3g}, stage {len(self.history.stages)} (sites with a log density or gradient that is "
                f"not finite: {', '.join(sites) or 'none in the latest draw'}). The parameters are the last "
                f"good ones. Start the guide where the model has a finite density (init_loc_fn, base_loc, "
                f"base_scale) or lower the learning rate."
            ) from None
        if net.inverse_temperature != t:
            self._start_stage(net.inverse_temperature)

    def _finds_finite_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(
            is_finite((), to_float(self.evaluate_loss(*args, **kwargs))) for _ in range(MAX_REJECTED - 1)
        )

    def _step_lr_scheduler(self, loss: float) -> None:
        if self.lr_schedule == "never" or not isinstance(self.optim, PyroLRScheduler):
            return
        if self.lr_schedule == "always" or self._objective.is_final:
            needs_loss = self.optim.pt_scheduler_constructor is ReduceLROnPlateau
            self.optim.step(loss) if needs_loss else self.optim.step()
