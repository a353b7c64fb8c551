r"""A second look at a posterior of many latents: fresh particles, and whether they find what a guide lacks.

A guide and the particles that it starts at may have lost the same mode. Others from the prior, with another
seed, cost seconds where another flow takes minutes. With their weights :math:`W_i`,

.. math:: \text{lost share} = \sum_i W_i\, 1\bigl[\hat Z q(z_i) < \tfrac{1}{100}\, p(z_i)\bigr] .
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch

from pyro_adaann.diagnostics.rules import Finding, Level
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.pilot import Watch, base_at, run_particles
from pyro_adaann.nested.density import Density
from pyro_adaann.nested.search import MAX_MISSED
from pyro_adaann.sampling.result import SMCResult

__all__ = ["REMARK", "agree", "find_more_evidence", "fresh_particles", "share_lost"]

#: What is said where a second look finds nothing.
REMARK = Finding(Level.GOOD, "Fresh particles of AnnealedSMC, from the prior, find nothing that it lacks.")
#: Standard errors, and nats beyond them, by which particles may find more evidence.
_NUM_ERRORS, _NEGLIGIBLE = 3.0, 0.1
#: Part of the posterior's density that a guide has to have.
_MIN_COVER = -math.log(100)


def fresh_particles(
    coordinates: Coordinates, num_latents: int, seed: int | None, watch: Watch
) -> SMCResult | None:
    """Return particles with another seed, None where they are of no use: they do not arrive, or lag.

    :param coordinates: in which the model is fitted.
    :param num_latents: unconstrained numbers of the model.
    :param seed: of the particles.
    :param watch: progress, clock and Ctrl-C.
    """
    watch[0].phase("second look")
    own = coordinates
    particles = run_particles(own.model, own.args, own.kwargs, num_latents, seed, watch)
    return None if particles is None or base_at(particles) is None else particles


def agree(coordinates: Coordinates, guide: Any, diagnosis: Diagnosis, particles: SMCResult) -> bool:
    """Whether particles find nothing that a guide lacks: no part of the posterior, and no more evidence.

    :param coordinates: in which the model is fitted.
    :param guide: with the density ``get_posterior(...)`` of its free numbers.
    :param diagnosis: of its draws.
    :param particles: in the same coordinates.
    """
    lost = share_lost(coordinates, guide, diagnosis, particles)
    return lost <= MAX_MISSED and not find_more_evidence(particles, diagnosis)


@torch.no_grad()
def share_lost(coordinates: Coordinates, guide: Any, diagnosis: Diagnosis, particles: SMCResult) -> float:
    """Return the share of particles at which a guide has less than a hundredth of the posterior's density."""
    args, kwargs = coordinates.args, coordinates.kwargs
    weights = particles.log_weights.double().softmax(0)
    z = particles.unconstrained[weights > 0]
    log_p = Density(coordinates.model, args, kwargs).log_p(z)
    with pyro.get_param_store().scope():
        log_q = guide.get_posterior(*args, **kwargs).log_prob(z)
    is_held = log_q.double() + diagnosis.log_evidence - log_p >= _MIN_COVER
    return float(weights[weights > 0] @ (~is_held).double())


def find_more_evidence(particles: SMCResult, diagnosis: Diagnosis) -> bool:
    """Whether particles surely find more evidence."""
    error = math.hypot(particles.log_evidence_error, diagnosis.log_evidence_se)
    excess = particles.log_evidence - diagnosis.log_evidence
    return not excess <= _NUM_ERRORS * error + _NEGLIGIBLE
