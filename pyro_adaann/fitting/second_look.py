r"""A second look at a posterior of many latents: fresh particles, and whether they find what a guide lacks.

A guide and the particles that it starts at may have lost the same mode. Others from the prior, with another
seed, cost seconds where another flow takes minutes. With their weights :math:`W_i`,

.. math:: \text{lost share} = \sum_i W_i\, 1\bigl[\hat Z q(z_i) < \tfrac{1}{100}\, p(z_i)\bigr] .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch

from pyro_adaann.diagnostics.numbers import percent
from pyro_adaann.diagnostics.rules import Finding, Level
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.pilot import Watch, base_at, run_particles
from pyro_adaann.nested.density import Density
from pyro_adaann.nested.search import MAX_MISSED
from pyro_adaann.nested.tries import is_missed
from pyro_adaann.sampling.result import SMCResult

__all__ = [
    "NO_TIME",
    "REMARK",
    "agree",
    "fresh_particles",
    "lost_of",
    "share_lost",
    "without_lag",
]

#: What is said where a second look finds nothing, and where it has not come to its end.
REMARK = Finding(
    Level.GOOD, "Of fresh particles of AnnealedSMC, from the prior, at most 2% lie where it lacks density."
)
NO_TIME = Finding(
    Level.NOT_FINISHED,
    "A second look, by fresh particles from the prior, was not finished: a mode may have been lost.",
)
#: Standard errors, and nats beyond them, by which particles may find more evidence.
_NUM_ERRORS, _NEGLIGIBLE = 3.0, 0.1


def fresh_particles(
    coordinates: Coordinates, num_latents: int, seed: int | None, watch: Watch
) -> SMCResult | None:
    """Return particles with another seed, None if they do not arrive.

    :param coordinates: in which the model is fitted.
    :param num_latents: unconstrained numbers of the model.
    :param seed: of the particles.
    :param watch: progress, clock and Ctrl-C.
    """
    watch[0].phase("second look")
    own = coordinates
    return run_particles(own.model, own.args, own.kwargs, num_latents, seed, watch)


def without_lag(looks: Sequence[SMCResult]) -> list[SMCResult]:
    """Return the sets of particles that have arrived at the posterior; others are no witnesses."""
    return [particles for particles in looks if base_at(particles) is not None]


def agree(coordinates: Coordinates, guide: Any, diagnosis: Diagnosis, particles: SMCResult) -> bool:
    """Whether particles find nothing that a guide lacks: no part of the posterior, and no more evidence.

    :param coordinates: in which the model is fitted.
    :param guide: with the density ``get_posterior(...)`` of its free numbers.
    :param diagnosis: of its draws.
    :param particles: in the same coordinates.
    """
    lost = share_lost(coordinates, [guide], diagnosis.log_evidence, particles)
    return lost <= MAX_MISSED and not _find_more_evidence(particles, diagnosis)


@torch.no_grad()
def share_lost(
    coordinates: Coordinates, guides: Sequence[Any], log_evidence: float, particles: SMCResult
) -> float:
    """Return the share of particles at which a mixture of guides has less than a hundredth of the density."""
    args, kwargs = coordinates.args, coordinates.kwargs
    weights = particles.log_weights.double().softmax(0)
    z = particles.unconstrained[weights > 0]
    log_p = Density(coordinates.model, args, kwargs).log_p(z)
    densities = []
    for guide in guides:
        with pyro.get_param_store().scope():
            densities.append(guide.get_posterior(*args, **kwargs).log_prob(z).double())
    log_q = torch.stack(densities).nan_to_num(-torch.inf).logsumexp(0) - math.log(len(densities))
    return float(weights[weights > 0] @ is_missed(log_q + log_evidence, log_p).double())


def lost_of(
    coordinates: Coordinates, guides: Sequence[Any], log_evidence: float, looks: Sequence[SMCResult]
) -> list[Finding]:
    """Return what is to be said of particles that no guide of a result holds.

    :param coordinates: in which the model is fitted.
    :param guides: of all fits.
    :param log_evidence: of their mixture.
    :param looks: the particles.
    """
    lost = max((share_lost(coordinates, guides, log_evidence, each) for each in looks), default=0.0)
    if lost <= MAX_MISSED:
        return []
    sentence = (
        f"{percent(lost)} of the particles of AnnealedSMC lie where the guides have hardly any "
        f"of the posterior's density: a mode may be lost. Ask for more fits (num_fits)."
    )
    return [Finding(Level.LOST_PART, sentence)]


def _find_more_evidence(particles: SMCResult, diagnosis: Diagnosis) -> bool:
    """Whether particles surely find more evidence."""
    error = math.hypot(particles.log_evidence_error, diagnosis.log_evidence_se)
    excess = particles.log_evidence - diagnosis.log_evidence
    return not excess <= _NUM_ERRORS * error + _NEGLIGIBLE
