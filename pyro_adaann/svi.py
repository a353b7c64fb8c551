"""`AdaAnnSVI`: `pyro.infer.SVI` that anneals the posterior while it fits the guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Literal

import pyro
import pyro.infer.util
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_adaann.endings import announce_short_training, count_annealing_steps, watch_end
from pyro_adaann.objective import Objective
from pyro_adaann.progress import ProgressBar
from pyro_adaann.results import AnnealingHistory, AnnealingStage
from pyro_adaann.schedules import AdaAnnSchedule, AnnealingSchedule, standard_deviation
from pyro_adaann.tempering import Path, TemperedTrace_ELBO, check_can_temper, get_path

__all__ = ["AdaAnnSVI"]

#: Attempts at a finite loss before the driver says that there is none.
_MAX_REJECTED = 100
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
        :class:`~pyro_adaann.Path`; :mod:`pyro_adaann.paths` says what each of them targets.
    :param num_initial_steps: T0 in the paper, steps at the first inverse temperature.
    :param num_steps_per_stage: T, steps at every inverse temperature between the first and 1.
    :param num_final_steps: T1, steps at 1 before :attr:`is_done`.
    :param num_final_particles: N1, particles of the ELBO at 1; by default its own number.
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

    With `Trace_ELBO`, a particle whose log density is not finite adds nothing to the update. A loss
    or gradient that is not finite changes no parameter. Both are counted in :attr:`history`. While
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
        num_variance_samples: int | None = None,
        num_training_steps: int | None = None,
        lr_schedule: Literal["final", "always", "never"] = "final",
        loss_and_grads: Callable[..., Any] | None = None,
    ) -> None:
        path = get_path(path)
        schedule = AdaAnnSchedule() if schedule is None else schedule
        _check_parts(guide, optim, loss, schedule, path)
        _check_count("num_initial_steps", num_initial_steps, 0)
        _check_count("num_steps_per_stage", num_steps_per_stage, 1)
        _check_count("num_final_steps", num_final_steps, 1)
        _check_count("num_final_particles", num_final_particles, 1)
        _check_count("num_variance_samples", num_variance_samples, 2)
        _check_count("num_training_steps", num_training_steps, 1)
        if num_final_particles is not None and not isinstance(loss, ELBO):
            raise ValueError(
                f"Expected an ELBO, which has particles, with `num_final_particles`; got a "
                f"{type(loss).__name__}."
            )
        if lr_schedule not in ("final", "always", "never"):
            raise ValueError(
                f"Expected `lr_schedule` to be 'final', 'always' or 'never'; got {lr_schedule!r}."
            )
        super().__init__(model, guide, optim, loss, loss_and_grads)
        self.schedule = schedule
        self.path = path
        self.num_initial_steps = num_initial_steps
        self.num_steps_per_stage = num_steps_per_stage
        self.num_final_steps = num_final_steps
        self.num_variance_samples = num_variance_samples
        self.lr_schedule = lr_schedule
        #: The :class:`~pyro_adaann.AnnealingHistory` of the fit so far.
        self.history = AnnealingHistory()

        recycles = schedule.needs_log_factor and num_variance_samples is None
        self._objective = Objective(
            loss,
            self.loss,
            self.loss_and_grads,
            path,
            num_final_particles,
            num_steps_per_stage if recycles else 0,
            # At 1 from the start it is plain SVI, to the last digit.
            _MAX_GRADIENT_RATIO if schedule.initial_inverse_temperature < 1 else math.inf,
        )
        self.loss = self._objective.loss
        self.loss_and_grads = self._objective.loss_and_grads
        self._start_stage(schedule.initial_inverse_temperature)
        self._num_rejected_in_a_row = 0
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
        """Whether annealing has ended and ``num_final_steps`` steps have followed."""
        return self._objective.is_final and self._stage.num_steps >= self.num_final_steps

    @property
    def _stage(self) -> AnnealingStage:
        return self.history.stages[-1]

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one optimizer step and return the loss, a float, as `SVI.step` does.

        The loss is that of the present inverse temperature. The arguments go to model and guide.

        :raises ValueError: if the loss is not finite in 100 attempts, at the first step or in 100
            steps in a row. The parameters then are what they were before.
        """
        self._advance(args, kwargs)
        try:
            loss, params = self._loss_and_params(args, kwargs)
        except ValueError as error:
            if not self._objective.forgives(error):
                raise
            loss, params = self._loss_and_params(args, kwargs)
        loss = _to_float(loss)
        is_accepted = _is_finite(params, loss if self._objective.reports_loss else 0.0)
        if is_accepted:
            self.optim(params)
        pyro.infer.util.zero_grads(params)
        self._count(loss, is_accepted, args, kwargs)
        return loss

    def run(self, *args: Any, progress_bar: bool = True, **kwargs: Any) -> AnnealingHistory:
        """Anneal and refine until :attr:`is_done`; return the :attr:`history`.

        :param args: arguments of model and guide, as ``kwargs``.
        :param progress_bar: whether to show inverse temperature, stage, loss, rate and the projected
            end.
        """
        num_steps = self.num_steps_per_stage, self.num_final_steps
        with ProgressBar(self.history, self.schedule, *num_steps, progress_bar) as bar:
            while not self.is_done:
                loss = self.step(*args, **kwargs)
                self._step_lr_scheduler(loss)
                bar.update()
        return self.history

    def restart(self) -> None:
        """Anneal once more from the schedule's first inverse temperature, with the guide as it is.

        This makes every schedule a cyclical one (Fu et al., *Cyclical annealing schedule*, NAACL 2019).
        A cycle rises to 1 and stays there for ``num_final_steps`` steps::

            for epoch in range(num_epochs):
                if svi.is_done:
                    svi.restart()
                for batch in loader:
                    svi.step(batch)
        """
        self._start_stage(self.schedule.initial_inverse_temperature)

    def _loss_and_params(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, set[Tensor]]:
        """Return the loss and the parameters it has met, which hold its gradient."""
        with poutine.trace(param_only=True) as capture:
            try:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
            except ValueError:
                # Particles before the one at fault may have left their gradients.
                pyro.infer.util.zero_grads(_captured(capture))
                raise
        return loss, _captured(capture)

    def _advance(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start the next stage if the present one has all its steps.

        At the start of a step and not at the end of the one before, so that `inverse_temperature` is
        always the one at which the guide has been trained.
        """
        stage = self._stage
        is_first = stage.inverse_temperature == self.schedule.initial_inverse_temperature
        length = self.num_initial_steps if is_first else self.num_steps_per_stage
        if self._objective.is_final or stage.num_steps < length:
            return
        draws = None
        if self.schedule.needs_log_factor:
            draws = self._objective.draw_log_factors(
                self.num_variance_samples, self.model, self.guide, args, kwargs
            )
            finite = draws[torch.isfinite(draws)]
            stage.num_draws = draws.numel()
            stage.num_nonfinite_draws = draws.numel() - finite.numel()
            stage.log_factor_mean = float(finite.mean()) if finite.numel() else None
            stage.log_factor_sd = standard_deviation(finite)
        self._start_stage(self.schedule.next(stage.inverse_temperature, draws))

    def _start_stage(self, inverse_temperature: float) -> None:
        self.history.stages.append(AnnealingStage(inverse_temperature))
        is_final = inverse_temperature >= self.schedule.final_inverse_temperature
        self._objective.start_stage(inverse_temperature, is_final=is_final)

    def _count(self, loss: Any, is_accepted: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stage = self._stage
        stage.losses.append(loss[0] if isinstance(loss, tuple) else loss)
        stage.num_broken = self._objective.num_broken
        stage.num_particles = self._objective.num_particles
        if is_accepted:
            self._num_rejected_in_a_row = 0
            return
        stage.num_rejected += 1
        self._num_rejected_in_a_row += 1
        is_start = self.history.num_steps == 1
        if is_start and not self._finds_finite_loss(args, kwargs):
            self._num_rejected_in_a_row = _MAX_REJECTED
        if self._num_rejected_in_a_row >= _MAX_REJECTED:
            sites = _nonfinite_sites(self.model, self.guide, args, kwargs)
            raise ValueError(
                f"Expected a finite loss; got none in {_MAX_REJECTED} attempts at inverse "
                f"temperature {stage.inverse_temperature:.3g} (sites with a log density or gradient "
                f"that is not finite: {', '.join(sites) or 'none in the latest draw'}). The "
                f"parameters are unchanged. Start the guide where the model has a finite density "
                f"(init_loc_fn, base_loc, base_scale) or lower the learning rate."
            )

    def _finds_finite_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(
            _is_finite((), _to_float(self.evaluate_loss(*args, **kwargs))) for _ in range(_MAX_REJECTED - 1)
        )

    def _step_lr_scheduler(self, loss: float) -> None:
        if self.lr_schedule == "never" or not isinstance(self.optim, PyroLRScheduler):
            return
        if self.lr_schedule == "always" or self._objective.is_final:
            needs_loss = self.optim.pt_scheduler_constructor is ReduceLROnPlateau
            self.optim.step(loss) if needs_loss else self.optim.step()


def _captured(capture: Any) -> set[Tensor]:
    return {site["value"].unconstrained() for site in capture.trace.nodes.values()}


def _check_parts(guide: Any, optim: Any, loss: Any, schedule: AnnealingSchedule, path: Path) -> None:
    if not isinstance(optim, PyroOptim):
        raise ValueError(
            f"Expected `optim` to be a pyro.optim.PyroOptim; got {type(optim).__name__}. Use for "
            f"example pyro.optim.Adam({{'lr': 0.001}})."
        )
    if not isinstance(schedule, AnnealingSchedule):
        raise ValueError(
            f"Expected `schedule` to be an AnnealingSchedule; got {type(schedule).__name__}. For a "
            f"list of inverse temperatures use SequenceSchedule."
        )
    if isinstance(loss, ELBO):
        _check_count("loss.num_particles", loss.num_particles, 1)
    if isinstance(loss, TemperedTrace_ELBO):
        raise ValueError(
            "Expected a loss of the untempered model; got TemperedTrace_ELBO, which AdaAnnSVI would "
            "temper once more. Use Trace_ELBO here, or TemperedTrace_ELBO with pyro.infer.SVI."
        )
    if schedule.needs_log_factor and path.entropy != 1:
        raise ValueError(
            f"Expected a fixed schedule on path {path.name!r}; got {type(schedule).__name__}. Its steps "
            f"are equal in the KL divergence between tempered posteriors of a given model, and KL "
            f"warm-up is for a model that is still being learned. Use LinearSchedule, CosineSchedule or "
            f"SequenceSchedule."
        )
    if schedule.initial_inverse_temperature < 1:
        check_can_temper(guide, loss, path)


def _check_count(name: str, value: int | None, minimum: int) -> None:
    if value is not None and (not isinstance(value, int) or value < minimum):
        raise ValueError(f"Expected `{name}` to be an integer >= {minimum}; got {value!r}.")


def _to_float(loss: Any) -> Any:
    # As in SVI: some losses return a tuple, e.g. ReweightedWakeSleep.
    if isinstance(loss, tuple):
        return type(loss)(map(pyro.infer.util.torch_item, loss))
    return pyro.infer.util.torch_item(loss)


def _is_finite(params: Collection[Tensor], loss: Any) -> bool:
    if not all(map(math.isfinite, loss if isinstance(loss, tuple) else (loss,))):
        return False
    # A sum is finite only if all its terms are.
    sums = [param.grad.sum() for param in params if param.grad is not None]
    return all(math.isfinite(value) for value in torch.stack(sums).tolist()) if sums else True


def _nonfinite_sites(model: Any, guide: Any, args: Any, kwargs: Any) -> list[str]:
    names = []
    with pyro.validation_enabled(False), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        for trace in (guide_trace, model_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and name not in names:
                    log_prob = torch.as_tensor(site["fn"].log_prob(site["value"]))
                    if not torch.isfinite(log_prob).all():
                        names.append(name)
    return names
