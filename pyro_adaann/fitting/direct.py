r"""A posterior that is normal but for one or two coordinates, in one mode or several, without a flow.

Annealed particles say where it is, and a nested Laplace approximation q around them has weights that hardly
differ. Then a flow, which takes minutes, would bring nothing, unless q lacks a part. That the particles show,
which come from the prior: with weights :math:`W_i`,

.. math:: \text{lost share} = \sum_i W_i\, 1\bigl[q(z_i) < \tfrac{1}{100}\, p(z_i)\bigr] .
"""

from __future__ import annotations

from typing import NamedTuple

import pyro

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
from pyro_adaann.fitting.second_look import agree, find_more_evidence, fresh_particles
from pyro_adaann.sampling.result import SMCResult
from pyro_adaann.weights import finite_or_no_weight

__all__ = ["Direct", "fit_directly"]


class Direct(NamedTuple):
    """A fit without a flow.

    :param nested: the approximation.
    :param draws: its weighted draws, of the model's own sites.
    :param diagnosis: of these.
    :param remark: what is said of it.
    """

    nested: Nested
    draws: WeightedDraws
    diagnosis: Diagnosis
    remark: Finding


def fit_directly(
    coordinates: Coordinates,
    particles: SMCResult,
    num_samples: int,
    seed: int | None = None,
    watch: Watch | None = None,
) -> Direct | None:
    """Return a fit by a nested Laplace approximation, None where it is not good or lacks a part.

    :param coordinates: in which the model is fitted.
    :param particles: of the posterior, in these coordinates.
    :param num_samples: draws.
    :param seed: of them; None to go on with torch's generator as it is.
    :param watch: progress, clock and Ctrl-C of the fit.
    """
    if seed is not None:
        pyro.set_rng_seed(seed)
    nested = search(coordinates, particles.unconstrained.double(), particles.log_weights, watch)
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
    if diagnosis.level > Level.USABLE_WITH_WEIGHTS or find_more_evidence(particles, diagnosis):
        return None
    if nested.guide.num_modes > 1 and watch is not None:  # where there are some, there may be one more
        next_seed = None if seed is None else seed + 1
        fresh = fresh_particles(coordinates, nested.guide.latent_dim, next_seed, watch)
        if fresh is None or not agree(coordinates, nested.guide, diagnosis, fresh):
            return None
    guide = nested.guide
    but = f"But for {names_of(guide)} the" if guide.num_modes == 1 else "In each of its modes the"
    text = (
        f"{but} posterior is nearly normal: the draws are of a {what_it_is(guide)}, in which particles of "
        f"AnnealedSMC find nothing missing."
    )
    return Direct(nested, coordinates.restore(draws), diagnosis, Finding(Level.GOOD, text))
