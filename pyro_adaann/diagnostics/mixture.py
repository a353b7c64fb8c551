"""Weighted draws from the rungs of a ladder and the guide together, for a guide that lost a part."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.state.rungs import guide_at, rungs_and_guide
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.weights import pareto_smooth, reliable_shape

__all__ = ["mixture_draws"]


def mixture_draws(
    svi: AdaAnnSVI,
    *args: Any,
    num_samples: int = 50_000,
    batch_size: int = 1000,
    vectorize: bool = True,
    **kwargs: Any,
) -> WeightedDraws:
    r"""Draw from the rungs of a ladder and the guide together, and weight the draws by the posterior.

    .. math:: w_i = \frac{p(x, z_i)}{\tfrac{1}{R} \sum_r q_r(z_i)}, \qquad z_i \sim q_1, \dots, q_R

    If a rung still has a part that the guide lost, the weighted draws contain it; Pareto k-hat and effective
    sample size measure how well. A part that is much narrower than the rung gets few draws with large weights
    and too small a share, and k-hat is too large then.

    :param svi: a fit with a ladder.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: total number of draws, the same number from every rung.
    :param batch_size: how many at a time.
    :param vectorize: whether model and guide run on a whole batch at once; False is slower and always works.
    :raises ValueError: if the fit has no ladder or has taken no step, and as :func:`diagnose` does.

    Warns if k-hat is too large. Anneal again then from the rung that :func:`find_lost_parts` names, more
    slowly (``svi.restart(rung)``), or fit again with more particles.

    Source: Veach and Guibas, *Optimally combining sampling techniques*, SIGGRAPH 1995 (the balance
    heuristic).

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_adaann import AutoPlanar, AdaAnnSchedule, Ladder
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> pyro.clear_param_store()  # a new fit
        >>> svi = AdaAnnSVI(model, AutoPlanar(model, 4), pyro.optim.Adam({"lr": 0.01}),
        ...                 Trace_ELBO(num_particles=20, vectorize_particles=True), ladder=Ladder(),
        ...                 schedule=AdaAnnSchedule(0.5), num_initial_steps=20, num_final_steps=20)
        >>> history = svi.run(progress_bar=False)
        >>> abs(float(mixture_draws(svi).mean("z"))) < 0.1  # exactly 0
        True
    """
    rungs = rungs_and_guide(svi.ladder)
    num_each = -(-num_samples // len(rungs))
    draws = GuideDraws(svi, args, kwargs, vectorize=vectorize)
    samples: dict[str, list[Tensor]] = {name: [] for name in draws.latent_names}
    parts = []
    for own in rungs:
        with guide_at(own, svi._fit.parameters.tensors):
            batches = list(draws.batches(num_each, batch_size))
        traces = [(batch.guide_trace, len(batch.log_p)) for batch in batches]
        mixture = []
        for rung in rungs:
            with guide_at(rung, svi._fit.parameters.tensors):
                mixture.append(draws.score_guide(traces))
        # A draw that a rung's inverse does not reach has no density under that rung.
        log_mixture = torch.stack(mixture).nan_to_num(-torch.inf).logsumexp(0) - math.log(len(rungs))
        log_q = torch.cat([draws.guide_density(*trace) for trace in traces])
        log_p, whole = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("log_p", "log_q"))
        # The rest of the guide's density, that of its Delta sites, does not depend on the rung.
        parts.append((log_p, whole - log_q + log_mixture))
        for name, values in samples.items():
            values += [draws.values(trace, name, num) for trace, num in traces]
    log_p, log_q = map(torch.cat, zip(*parts, strict=True))
    smoothed, k_hat = pareto_smooth(log_p - log_q)
    if k_hat > reliable_shape(len(log_p)):
        warnings.warn(
            f"The weights of the mixture are unreliable (k-hat {k_hat:.2f}): no rung is close enough to the "
            f"posterior, and the share of a lost part may be far too small. Take more draws (num_samples), "
            f"anneal again from the rung below the loss with smaller steps (svi.restart), or fit again with "
            f"more particles.",
            stacklevel=2,
        )
    cat = {name: torch.cat(values) for name, values in samples.items()}
    return WeightedDraws(cat, log_p, log_q, smoothed, k_hat)
