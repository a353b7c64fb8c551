"""`fit`: from a model to posterior draws with a verdict, with nothing to choose."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pyro

from pyro_adaann.checks import check_count
from pyro_adaann.diagnostics.model_and_guide import plate_nesting
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.assemble import result_of_attempts, result_without_flow
from pyro_adaann.fitting.attempts import (
    Attempt,
    End,
    Plan,
    attempt,
    few_draws_of_step,
    make_guide,
    takes_long,
)
from pyro_adaann.fitting.clock import Clock
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.decentering import Start, choose_start
from pyro_adaann.fitting.direct import fit_directly
from pyro_adaann.fitting.models import check_model, for_many_draws
from pyro_adaann.fitting.necks import Nested, complete, find_nested
from pyro_adaann.fitting.pilot import Watch, base_at, has_pilot
from pyro_adaann.fitting.plans import NUM_PARTICLES, next_plan
from pyro_adaann.fitting.progress import FitProgress
from pyro_adaann.fitting.result import FitResult
from pyro_adaann.fitting.second_look import NO_TIME, REMARK, agree, fresh_particles, without_lag
from pyro_adaann.nested.guide import NestedGuide
from pyro_adaann.sampling.missing import without_missing
from pyro_adaann.sampling.result import SMCResult
from pyro_adaann.state.interrupt import InterruptGuard
from pyro_adaann.state.random_states import get_random_states, set_random_states

__all__ = ["fit"]

#: Draws of every fit behind draws, verdict and evidence, and where a draw takes long.
_NUM_SAMPLES, _FEW_SAMPLES = 10_000, 4000


def fit(
    model: Callable[..., Any],
    *args: Any,
    seed: int | None = None,
    budget: float | None = None,
    num_fits: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> FitResult:
    r"""Fit a model with nothing to choose; return weighted posterior draws, log evidence and a verdict.

    Numbers whose scale is itself a latent variable, as in a hierarchy, are fitted decentered where the data
    say little of them; the result is of the model's own sites.
    The guide is an :class:`~pyro_adaann.AutoSpline` whose base has location and scale of prior draws or, from
    sixteen latents on, mean and 1.5 times the width of particles of :class:`AnnealedSMC`; it is annealed by
    natural steps (:func:`~pyro_adaann.natural_svi`) and diagnosed (:func:`~pyro_adaann.diagnose`). Where
    posterior is or may be out of reach of its base, the base is widened, up to three times. Where the first
    fit is neither GOOD nor has weights that hardly differ, more are made from other seeds until a usable one
    and another, usable or nearly so, agree on the evidence and on every mean and sd, or, from sixteen latents
    on, fresh particles find nothing that a usable one lacks, six fits at most, and
    none after one that is not usable and has fallen behind its temperatures, or after 500 steps. The draws
    are those of all fits that count, weighted against the mixture of their guides. What remains is said in
    the verdict.

    Given one or two of its numbers a posterior may be nearly normal, however narrow, in one mode or in each
    of several. A nested Laplace approximation around these brings in the ends of necks that the fits lack,
    and is a witness for a fit that agrees with it; from sixteen latents on, where two sets of particles find
    nothing that it lacks, it is the result, and no flow is fitted.

    :param model: a Pyro model. One that does not run for many draws at once, under an outermost plate, is run
        for one after the other (:func:`one_by_one`), with a warning, since it takes many times as long.
    :param args: its arguments, with ``kwargs``.
    :param seed: of all random generators; they are as before afterwards. Without one they go on.
    :param budget: seconds for the steps. At the end of them the fit stops where it is and is diagnosed, which
        takes some seconds more, or as long as some 20,000 draws where the model takes long for each.
    :param num_fits: how many fits from different seeds; by default one that is GOOD, or as above.
    :param progress_bar: whether to show the phase, the step and the inverse temperature.
    :return: a :class:`FitResult`; print it.
    :raises ValueError: if an argument is out of range, if the model has parameters to learn, subsamples a
        plate, has discrete sites that it does not enumerate or no continuous ones, or runs neither for many
        draws at once nor for one after the other. :class:`~pyro_adaann.AdaAnnSVI` takes such models.
    :raises NotImplementedError: if a prior cannot be sampled (``ImproperUniform``); the message says what to
        write.

    The parameter store is left as it is. Ctrl-C ends the fit after the present step, and returns what there
    is.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
        ...     pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)
        >>> result = fit(model, torch.tensor(4.0), seed=0, progress_bar=False)
        >>> abs(float(result.mean("z"))) < 0.2  # exactly 0
        True
        >>> z = result.sample(1000)["z"]
        >>> 0.4 < float((z > 0).float().mean()) < 0.6  # both modes, of weight 1/2 each
        True
    """
    check_count("seed", seed, 0)
    check_count("num_fits", num_fits, 1)
    if budget is not None and not budget > 0:
        raise ValueError(f"Expected `budget` to be a positive number of seconds; got {budget!r}.")
    random = None if seed is None else get_random_states()
    try:
        model = without_missing(model, args, kwargs)
        trace = check_model(model, args, kwargs)
        with FitProgress(progress_bar) as progress, InterruptGuard() as interrupt:
            clock = Clock(budget)
            progress.phase("model")
            with pyro.get_param_store().scope():
                guide = make_guide(model, {}, args, kwargs)
                model = for_many_draws(model, guide, args, kwargs)
                watch, is_slow = (progress, clock, interrupt), takes_long(model, trace)
                start = Start(Coordinates(model, args, kwargs))
                # Particles of few latents are for coordinates alone: not where they take minutes.
                if has_pilot(guide.latent_dim) or not is_slow:
                    start = choose_start(model, args, kwargs, guide, seed, watch)
            size = _Size(plate_nesting(trace), NUM_PARTICLES, _NUM_SAMPLES)
            if is_slow:
                few = few_draws_of_step(guide.latent_dim, NUM_PARTICLES)
                size = size._replace(num_particles=few, num_samples=_FEW_SAMPLES)
            looks = [] if start.particles is None else [start.particles]
            if looks and has_pilot(guide.latent_dim) and num_fits is None:
                progress.phase("draws")
                direct = fit_directly(start.coordinates, looks, size.num_samples, seed, watch)
                if direct is not None:
                    return result_without_flow(model, start.coordinates, direct, clock)
            fitter = _Fitter(start, size, watch, without_lag(looks))
            attempts = fitter.run(seed, num_fits)
            progress.phase("draws")
            seen = [REMARK] if fitter.is_confirmed else [NO_TIME] if fitter.is_cut_short else []
            return result_of_attempts(
                model,
                start.coordinates,
                attempts,
                fitter.nested,
                size.num_samples,
                clock,
                seen,
                fitter.looks,
            )
    finally:
        if random is not None:
            set_random_states(random)


class _Size(NamedTuple):
    """What fits of a model need to know of it.

    :param nesting: how many plates it nests.
    :param num_particles: draws of a natural step of the first fit.
    :param num_samples: draws behind draws, verdict and evidence.
    """

    nesting: int
    num_particles: int
    num_samples: int


class _Fitter:
    """Makes one attempt after the other until what there is will do.

    :param start: the coordinates in which the model is fitted, and where the first attempt starts.
    :param size: what there is to know of it.
    :param watch: progress, clock and Ctrl-C.
    :param looks: particles of the posterior.
    """

    def __init__(self, start: Start, size: _Size, watch: Watch, looks: list[SMCResult]) -> None:
        self._start, self._coordinates = start, start.coordinates
        self._size = size
        self._watch = watch
        #: The best nested Laplace approximation so far.
        self.nested: Nested | None = None
        #: Whether fresh particles have found nothing that the last fit lacks.
        self.is_confirmed = False
        #: Whether there was no time for them, or somebody has stopped them.
        self.is_cut_short = False
        self._fresh: SMCResult | None = None
        #: All particles of the posterior so far, of which a result has to hold nearly all.
        self.looks = looks

    def run(self, seed: int | None, num_fits: int | None) -> list[Attempt]:
        """Return all attempts, the first one first."""
        base, is_started = self._start.base, self._start.has_run
        plan = Plan(seed, {}, self._size.num_particles, start=base, is_started=is_started)
        attempts = [self._attempt(plan, "fit 1")]
        self._look(attempts[-1])
        while self._goes_on(attempts):
            following = next_plan(attempts, seed, num_fits)
            if following is None or (num_fits is None and self._has_second_opinion(attempts[-1], following)):
                break
            plan = following
            if not self._goes_on(attempts):  # the second look has taken some time, or was ended
                self.is_cut_short = self._fresh is None
                break
            if self._fresh is not None and has_pilot(attempts[-1].svi.guide.latent_dim):
                plan = replace(plan, start=base_at(self._fresh), is_started=True)
            is_wider = plan.widths != attempts[-1].plan.widths
            try:
                name = f"fit {len(attempts) + 1}{', wider base' if is_wider else ''}"
                attempts.append(self._attempt(plan, name))
                self._look(attempts[-1])
            except ValueError as error:
                warnings.warn(f"One more fit has failed, and is left out ({error}).", stacklevel=3)
                break
        return attempts

    def _goes_on(self, attempts: list[Attempt]) -> bool:
        """Whether nobody has stopped it, and there is time for an attempt like the last one."""
        last, clock = attempts[-1], self._watch[1]
        return last.end is End.DONE and not self._watch[2].requested and clock.has(last.seconds)

    def _look(self, attempt: Attempt) -> None:
        """Look for a nested Laplace approximation, unless there is a good one or the time is over."""
        if attempt.end is not End.DONE or (self.nested is not None and self.nested.is_witness):
            return
        found = find_nested(self._coordinates, attempt, self._watch)
        if found is not None and (self.nested is None or found.share > self.nested.share):
            self.nested = found

    def _has_second_opinion(self, attempt: Attempt, following: Plan) -> bool:
        """Whether something that costs less than another fit bears witness to one."""
        own, guide = self._coordinates, attempt.svi.guide
        witness = self._witness(attempt)
        if witness is not None and witness[0].num_modes == 1:
            return True
        self._fresh = None
        # A witness made of the draws of a fit of several modes may lack the same one as the fit.
        if witness is not None or (following.is_check and has_pilot(guide.latent_dim)):
            self._fresh = fresh_particles(own, guide.latent_dim, following.seed, self._watch)
        if self._fresh is not None:
            held_by, found = witness or (guide, attempt.diagnosis)
            self.looks.append(self._fresh)
            self.is_confirmed = all(agree(own, held_by, found, each) for each in self.looks)
        return self.is_confirmed

    def _witness(self, attempt: Attempt) -> tuple[NestedGuide, Diagnosis] | None:
        """Return the nested Laplace approximation, if it is usable with an attempt, and their diagnosis."""
        nested, guide = self.nested, attempt.svi.guide
        if nested is None or not nested.is_witness:
            return None
        own, num = self._coordinates, self._size.num_samples
        completed = complete(own, nested, [guide], guide, attempt.moments, attempt.diagnosis, num)
        if completed is None or not completed.is_usable:
            return None
        return nested.guide, completed.diagnosis

    def _attempt(self, plan: Plan, name: str) -> Attempt:
        own = self._coordinates
        return attempt(
            own.model,
            own.args,
            own.kwargs,
            plan,
            self._size.nesting,
            self._size.num_samples,
            self._watch,
            name,
            own.restore,
        )
