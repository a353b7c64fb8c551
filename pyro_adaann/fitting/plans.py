"""How `fit` goes on after the attempts that it has made."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pyro_adaann.diagnostics.rules import Level
from pyro_adaann.fitting.attempts import Attempt, Plan
from pyro_adaann.fitting.combine import finds_more, is_good_alone, is_settled, is_witness
from pyro_adaann.fitting.pilot import has_pilot
from pyro_adaann.natural import NUM_BEHIND

__all__ = ["NUM_PARTICLES", "next_plan"]

#: Draws of a natural step, at first and where a fit was far from reliable.
NUM_PARTICLES, _MORE_PARTICLES = 500, 1000
#: How often a base is widened, and by what at least and at most.
_MAX_WIDENINGS, _MIN_WIDENING, _MAX_WIDENING = 3, 1.5, 4.0
#: By what where nothing says how much.
_WIDENING = 2.0
#: Where less than this share of the draws counts, another seed comes before a wider base.
_MIN_ESS_SHARE = 0.01
#: Fits in all.
_MAX_FITS = 6
#: After so many steps of `NUM_PARTICLES` draws in all, or after one that has fallen behind its temperatures,
#: no fit follows one that is not usable: more of a guide that follows slowly would change little, and take
#: minutes.
_MAX_STEPS = 500


def next_plan(attempts: Sequence[Attempt], seed: int | None, num_fits: int | None) -> Plan | None:
    """Return how to go on: from a wider base, from another seed, or, where none is needed, not at all."""
    last = attempts[-1]
    is_usable = last.diagnosis.level <= Level.USABLE_WITH_WEIGHTS
    next_seed = None if seed is None else seed + len(attempts)
    bases = [attempt.plan.widths for attempt in attempts]
    num_widenings = sum(a != b for a, b in pairwise(bases))
    is_long = _work(attempts) > _MAX_STEPS
    may_widen = num_widenings < _MAX_WIDENINGS and len(attempts) < _MAX_FITS
    # A guide that starts at particles is not widened for minutes.
    if may_widen and not (is_long and has_pilot(last.svi.guide.latent_dim)):
        widths = _widths(attempts)
        if widths is not None:
            return Plan(next_seed, widths, last.plan.num_particles)
    if num_fits is not None:
        is_enough = bases.count(last.plan.widths) >= num_fits
    else:
        is_good = is_good_alone(last) and len(attempts) == 1
        is_behind = last.svi.history.num_untracked_lately >= NUM_BEHIND
        is_hopeless = not is_usable and (is_behind or is_long)
        is_enough = is_good or is_settled(attempts) or len(attempts) >= _MAX_FITS or is_hopeless
    if is_enough:
        return None
    num_particles = attempts[0].plan.num_particles if is_witness(last) else _MORE_PARTICLES
    return Plan(next_seed, last.plan.widths, num_particles, is_check=is_usable and num_fits is None)


def _work(attempts: Sequence[Attempt]) -> float:
    """Return the steps of all attempts, in steps of the usual number of draws."""
    return sum(a.svi.history.num_steps * a.plan.num_particles / NUM_PARTICLES for a in attempts)


def _widths(attempts: Sequence[Attempt]) -> dict[str, float] | None:
    """Return how wide the base is to be where posterior is, or may be, out of reach; None where it is not."""
    last = attempts[-1]
    diagnosis, before = last.diagnosis, last.plan.widths
    reach = diagnosis.reach
    names = tuple(last.svi.guide._unconstrained_shapes)
    if reach is not None and reach.is_short:
        names = reach.sites or names
        factor = min(max(1.25 * reach.factor, _MIN_WIDENING), _MAX_WIDENING)
    elif reach is not None and not reach.is_known and diagnosis.ess > _MIN_ESS_SHARE * diagnosis.num_samples:
        factor = _WIDENING  # wider draws see something, and cannot tell how much
    elif len(attempts) > 1 and attempts[-2].plan.widths != before and finds_more(last, attempts[-2]):
        factor = _WIDENING  # what the last widening has brought may not be all
    else:
        return None
    return before | {name: factor * before.get(name, 1.0) for name in names}
