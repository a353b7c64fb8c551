r"""Draws of one or several guides, weighted against their mixture (the balance heuristic).

.. math:: w_i = \frac{p(x, z_i)}{\tfrac{1}{R} \sum_r q_r(z_i)}, \qquad z_i \sim q_1, \dots, q_R

A part of the posterior that one guide lacks and another has is in the mixture; its share there is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.weights import finite_or_no_weight, pareto_smooth

__all__ = ["Apart", "Mixture", "alone", "weigh_guides"]


class Mixture(NamedTuple):
    """Draws of several guides, as many of each, one guide after the other.

    :param draws: with their weights against the mixture.
    :param log_weights: these before smoothing.
    :param own_log_weights: those of every guide's draws against its own density, ``(num_guides, n)``.
    """

    draws: WeightedDraws
    log_weights: Tensor
    own_log_weights: Tensor


def alone(draws: WeightedDraws) -> Mixture:
    """Return the mixture of one guide, of draws that have been weighted already."""
    log_weights = finite_or_no_weight(draws.log_p - draws.log_q)
    return Mixture(draws, log_weights, log_weights.unsqueeze(0))


class Apart:
    """A guide that runs in a parameter store of its own: guides of one class have the same names in one.

    :param guide: the guide.
    """

    def __init__(self, guide: Callable[..., Any]) -> None:
        self.guide = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.get_param_store().scope():
            return self.guide(*args, **kwargs)


def weigh_guides(
    model: Callable[..., Any],
    guides: Sequence[Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    batch_size: int,
) -> Mixture:
    """Draw from every guide, and weight the draws against the mixture of all and by each alone.

    :param num_samples: draws of every guide.
    :raises ValueError: as :func:`diagnose` does.
    """
    draws = [GuideDraws((model, Apart(guide)), args, kwargs, vectorize=True) for guide in guides]
    samples: dict[str, list[Tensor]] = {name: [] for name in draws[0].latent_names}
    parts = []
    for own in draws:
        traces, columns = [], []
        for batch in own.batches(num_samples, batch_size):
            traces.append((batch.guide_trace, len(batch.log_p)))
            columns.append((batch.log_p, batch.log_q, batch.log_weights))
        log_p, log_q, log_weights = map(torch.cat, zip(*columns, strict=True))
        log_own = torch.cat([own.guide_density(*trace) for trace in traces])
        densities = [log_own if other is own else other.score_guide(traces) for other in draws]
        # A draw out of reach of a guide's inverse has no density there.
        log_mixture = torch.stack(densities).nan_to_num(-torch.inf).logsumexp(0) - math.log(len(draws))
        # The rest, the change from free to constrained coordinates, is the same for all.
        parts.append((log_p, log_q - log_own + log_mixture, log_weights))
        for name, values in samples.items():
            values += [own.values(trace, name, num) for trace, num in traces]
    log_p, log_q, own_log_weights = map(torch.cat, zip(*parts, strict=True))
    log_weights = finite_or_no_weight(log_p - log_q)
    smoothed, k_hat = pareto_smooth(log_weights)
    cat = {name: torch.cat(values) for name, values in samples.items()}
    weighted = WeightedDraws(cat, log_p, log_q, smoothed, k_hat)
    return Mixture(weighted, log_weights, own_log_weights.reshape(len(guides), -1))
