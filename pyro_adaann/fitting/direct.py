r"""A posterior that is normal but for one or two coordinates, in one mode or several, without a flow.

Annealed particles say where it is, and a nested Laplace approximation q around them has weights that hardly
differ. Then a flow, which takes minutes, would bring nothing, unless q lacks a part. That further particles
show, which come from the prior: with weights :math:`W_i` and the evidence :math:`\hat Z`,

.. math:: \text{lost share} = \sum_i W_i\, 1\bigl[\hat Z q(z_i) < \tfrac{1}{100}\, p(z_i)\bigr] .

Where they find something, the next approximation starts from all particles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro
import torch

from pyro_adaann.diagnostics.diagnose import statistics
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.importance import WeightedDraws, weigh_draws
from pyro_adaann.diagnostics.model_and_guide import has_scale
from pyro_adaann.diagnostics.rules import Finding, Level
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.attempts import BATCH_SIZE
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.mixture import Apart
from pyro_adaann.fitting.necks import Nested, names_of, search, what_it_is
from pyro_adaann.fitting.pilot import Watch
from pyro_adaann.fitting.second_look import NO_TIME, REMARK, fresh_particles, share_lost
from pyro_adaann.nested.search import MAX_MISSED
from pyro_adaann.sampling.result import SMCResult
from pyro_adaann.weights import finite_or_no_weight

__all__ = ["Direct", "fit_directly"]

#: From the seed of the fit to that of the particles of a second look: further fits take the next ones.
_OTHER_SEED = 1000
#: Sets of particles at most, after which flows have to find what these lack.
_MAX_LOOKS = 3


class Direct(NamedTuple):
    """A fit without a flow.

    :param nested: the approximation.
    :param draws: its weighted draws, of the model's own sites.
    :param diagnosis: of these.
    :param remarks: what is said of it.
    """

    nested: Nested
    draws: WeightedDraws
    diagnosis: Diagnosis
    remarks: list[Finding]


def fit_directly(
    coordinates: Coordinates,
    looks: list[SMCResult],
    num_samples: int,
    seed: int | None = None,
    watch: Watch | None = None,
) -> Direct | None:
    """Return a fit by a nested Laplace approximation, None where it is not good or lacks a part.

    :param coordinates: in which the model is fitted.
    :param looks: particles of the posterior, in these coordinates; gets those of further looks.
    :param num_samples: draws.
    :param seed: of them; None to go on with torch's generator as it is.
    :param watch: progress, clock and Ctrl-C of the fit; without one there is no second look.
    """
    for number in range(_MAX_LOOKS):
        if seed is not None:
            pyro.set_rng_seed(seed)
        found = _approximate(coordinates, looks, num_samples, watch)
        if found is None or watch is None:
            return found
        # Particles may have lost what others find: 70 % of a posterior of 24 latents in three sets of six.
        other = None if seed is None else seed + (number + 1) * _OTHER_SEED
        guide = found.nested.guide
        fresh = fresh_particles(coordinates, guide.latent_dim, other, watch)
        if fresh is None:
            is_stopped = watch[2].requested or not watch[1].is_endless
            return found._replace(remarks=[*found.remarks, NO_TIME]) if is_stopped else None
        looks.append(fresh)
        if share_lost(coordinates, [guide], found.diagnosis.log_evidence, fresh) <= MAX_MISSED:
            return found._replace(remarks=[*found.remarks, REMARK])
    return None


def _approximate(
    coordinates: Coordinates, looks: Sequence[SMCResult], num_samples: int, watch: Watch | None
) -> Direct | None:
    """Return a fit that starts from particles, None where it is not good or lacks some of them."""
    z = torch.cat([each.unconstrained.double() for each in looks])
    log_weights = torch.cat([each.log_weights.double().log_softmax(0) for each in looks])
    nested = search(coordinates, z, log_weights, watch)
    if nested is None or not nested.is_witness:
        return None
    args, kwargs = coordinates.args, coordinates.kwargs
    drawn = GuideDraws((coordinates.model, Apart(nested.guide)), args, kwargs, vectorize=True)
    draws = weigh_draws(drawn, num_samples, BATCH_SIZE)
    diagnosis = Diagnosis(
        **statistics(finite_or_no_weight(draws.log_p - draws.log_q)),
        broken_cause=drawn.leniency.cause,
        is_done=True,
        is_scaled=has_scale(drawn.prototype),
    )
    if diagnosis.level > Level.USABLE_WITH_WEIGHTS:
        return None
    guide = nested.guide
    but = f"But for {names_of(guide)} the" if guide.num_modes == 1 else "In each of its modes the"
    text = f"{but} posterior is nearly normal: the draws are of a {what_it_is(guide)}."
    return Direct(nested, coordinates.restore(draws), diagnosis, [Finding(Level.GOOD, text)])
