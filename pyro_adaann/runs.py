"""Running a fit to its end, writing checkpoints, and resuming from them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

import pyro.infer.util
from pyro.optim import PyroLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_adaann.annealing.history import AnnealingHistory
from pyro_adaann.guide_status import expects_tempered
from pyro_adaann.processes.group import LostProcessError, anywhere, on_first
from pyro_adaann.state.checkpoint import CheckpointKeeper, read_checkpoint, write_checkpoint
from pyro_adaann.state.fit import Fit
from pyro_adaann.state.interrupt import InterruptGuard
from pyro_adaann.state.loop_watch import LoopWatch
from pyro_adaann.state.progress import show_progress
from pyro_adaann.state.resume import check_same_fit, fit_state, restore_fit
from pyro_adaann.steps.base import Step

__all__ = ["Runs"]


class Runs(ABC):
    """The part of `AdaAnnSVI` that takes many steps: run, save, resume."""

    optim: Any
    lr_schedule: str
    _fit: Fit
    _loop_watch: LoopWatch
    _settings: dict[str, str]

    @abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step and return the loss."""

    @property
    def history(self) -> AnnealingHistory:
        """The :class:`~pyro_adaann.AnnealingHistory` of the fit so far."""
        return self._fit.history

    @property
    def is_done(self) -> bool:
        """Whether annealing has ended and ``num_final_steps`` steps have followed, or the budget is used."""
        self._loop_watch.is_asked()
        return self._fit.stages.is_done

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

        Ctrl-C ends the run after the present step, with a warning and ``history.interrupted`` true; `run`
        again goes on from there.

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
            written at the end. If writing fails, the run warns and continues.
        :raises ValueError: if an argument is out of range, if the file cannot be used
            (:meth:`load_checkpoint`) or is another fit's, and as :meth:`step` does.
        """
        if num_steps is not None:
            self._fit.stages.set_budget(num_steps)
        keeper = None
        if checkpoint is not None:
            keeper = CheckpointKeeper(checkpoint, checkpoint_every, lambda: self._state())
            self._resume(checkpoint, args, kwargs)
        bar = show_progress(self.history, self._fit.settings.schedule, self._fit.stages.plan, progress_bar)
        with bar, InterruptGuard() as interrupt:
            try:
                while not (self.is_done or anywhere(interrupt.requested)):
                    loss = self.step(*args, **kwargs)
                    self._step_lr_scheduler(loss)
                    bar.update()
                    if keeper is not None:
                        keeper.step(self.history.num_steps)
            except LostProcessError:
                keeper = None  # the step has used up random numbers: the file of an earlier one is exact
                raise
            except KeyboardInterrupt:
                pyro.infer.util.zero_grads(self._fit.parameters.tensors.values())
            finally:
                if keeper is not None and self.history.num_steps:
                    keeper.write(self.history.num_steps)
        self.history.interrupted = not self.is_done
        self._fit.stages.warn_if_unfinished()
        if not (self.history.interrupted or isinstance(self.optim, Step)):
            self._fit.advise(args, kwargs)
        return self.history

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state of the fit to one file; a failed write leaves no partial file.

        :raises OSError: if writing fails; an earlier file at ``path`` is kept.
        """
        write_checkpoint(path, self._state())

    def load_checkpoint(self, path: str | os.PathLike[str], /, *args: Any, **kwargs: Any) -> None:
        """Restore the fit from a file of :meth:`save_checkpoint` or :meth:`run`.

        The next steps then give the numbers of the fit that wrote the file, bit for bit with the same
        versions on the same machine: the file contains the random states. It is read without running code
        from it.

        :param args: arguments of model and guide, as ``kwargs``; both run once.
        :raises ValueError: if the file is damaged, not a checkpoint, or of another version, model, guide or
            other settings. The fit is then unchanged.
        """
        state = read_checkpoint(path)
        self._sync_optim()
        with expects_tempered():
            restore_fit(self._fit, self._settings, state, args, kwargs)

    def _resume(self, path: str | os.PathLike[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        exists = on_first(lambda: os.path.exists(path))
        if exists and not self.history.num_steps:
            self.load_checkpoint(path, *args, **kwargs)
        elif exists:
            check_same_fit(path, self._fit.fit_id, self.history.num_steps)

    def _state(self) -> dict[str, Any]:
        self._sync_optim()
        return fit_state(self._fit, self._settings)

    def _sync_optim(self) -> None:
        """Use the present optimizer: the user may have assigned another one to the fit."""
        if not isinstance(self.optim, Step):
            self._fit.parameters.optim = self.optim

    def _step_lr_scheduler(self, loss: float) -> None:
        if self.lr_schedule == "never" or not isinstance(self.optim, PyroLRScheduler):
            return
        if self.lr_schedule == "always" or self._fit.objective.is_final:
            needs_loss = self.optim.pt_scheduler_constructor is ReduceLROnPlateau
            self.optim.step(loss) if needs_loss else self.optim.step()
