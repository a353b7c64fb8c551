"""Measure a fitted guide against the posterior, and give a verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.lost_parts import find_lost_parts
from pyro_adaann.diagnostics.model_and_guide import (
    Fit,
    get_inverse_temperature,
    get_model_and_guide,
    has_scale,
)
from pyro_adaann.diagnostics.opinion import AnnealedDraws, second_opinion
from pyro_adaann.diagnostics.reach import measure_reach
from pyro_adaann.diagnostics.thermodynamic import (
    ThermodynamicEstimate,
    final_node,
    history_nodes,
    integrate,
)
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.weights import effective_sample_size, log_mean_error, log_mean_weight, pareto_smooth

__all__ = ["Diagnosis", "assess", "diagnose", "statistics"]

#: Draws for the mean log factor at t = 1, which is one of many nodes.
_NUM_FINAL_DRAWS = 1000
#: Largest number of draws of a rung, in those of the guide: a lost part is seen through fewer of them.
_DRAWS_OF_A_RUNG = 2


def diagnose(
    svi: Fit,
    *args: Any,
    num_samples: int = 10_000,
    batch_size: int = 1000,
    vectorize: bool = True,
    smc: AnnealedDraws | None = None,
    **kwargs: Any,
) -> Diagnosis:
    r"""Measure a fitted guide against the posterior by the importance weights of its draws.

    .. math:: w_i = \frac{p(x, z_i)}{q(z_i)}, \quad z_i \sim q, \qquad
              p(x) \approx \frac{1}{n} \sum_i w_i, \qquad
              \mathrm{ELBO} \approx \frac{1}{n} \sum_i \log w_i

    Print the result for a verdict. Draws of the same guide from wider bases show parts of the posterior
    beyond the guide's draws, and the rungs of a ladder show parts lost while annealing. Memory grows by a few
    numbers for each draw.

    :param svi: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``. For the first two
        the inverse temperature is known, and a guide of a tempered posterior is reported as such.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: number of draws, at least 100; of every rung of a ladder up to twice as many.
    :param batch_size: how many at a time.
    :param vectorize: whether model and guide run on a whole batch at once; False is slower and always works.
    :param smc: a result of :class:`AnnealedSMC` on the same model, to compare with (:func:`second_opinion`).
    :raises ValueError: if ``num_samples`` < 100, if a plate is subsampled, if the guide misses a latent
        site, if the model does not vectorize, or if hardly any draw has a finite log density.

    Source: Yao et al., *Yes, but did it work? Evaluating variational inference*, ICML 2018; Vehtari et
    al., *Pareto smoothed importance sampling*, JMLR 25 (2024).

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> pyro.clear_param_store()  # a new fit
        >>> diagnosis = diagnose((model, AutoNormal(model, init_scale=0.9)), torch.tensor(0.0))
        >>> round(diagnosis.log_evidence, 1)  # exactly log N(0; 0, 2) = -1.27
        -1.3
        >>> diagnosis.verdict.split(".")[0]
        'USABLE WITH WEIGHTS'
    """
    _check_counts(num_samples, batch_size)
    draws = GuideDraws(svi, args, kwargs, vectorize=vectorize)
    log_weights = torch.cat([batch.log_weights for batch in draws.batches(num_samples, batch_size)])
    found = assess(svi, draws, log_weights, args, kwargs, batch_size, vectorize)
    if smc is None or not found.is_annealed:
        return found
    opinion = second_opinion(svi, smc, *args, num_samples=num_samples, vectorize=vectorize, **kwargs)
    return replace(found, opinion=opinion)


def assess(
    svi: Fit,
    draws: GuideDraws,
    log_weights: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int,
    vectorize: bool,
) -> Diagnosis:
    """Return the diagnosis of a fit from the log weights of its draws."""
    is_scaled = has_scale(draws.prototype)
    model, guide = get_model_and_guide(svi)
    num_samples = len(log_weights)
    return Diagnosis(
        **statistics(log_weights),
        broken_cause=draws.leniency.cause,
        inverse_temperature=get_inverse_temperature(svi),
        is_done=svi.is_done if isinstance(svi, AdaAnnSVI) else None,
        reach=measure_reach(model, guide, args, kwargs, num_samples, batch_size, vectorize),
        is_scaled=is_scaled,
        # Thermodynamic integration is not valid for a part of the data scaled up.
        thermodynamic=None if is_scaled else _thermodynamic(svi, args, kwargs, batch_size, vectorize),
        **_annealing(svi, args, kwargs, num_samples, batch_size, vectorize),
    )


def _check_counts(num_samples: int, batch_size: int) -> None:
    if num_samples < 100:
        raise ValueError(f"Expected `num_samples` >= 100, for a tail to be seen; got {num_samples}.")
    if batch_size < 1:
        raise ValueError(f"Expected `batch_size` >= 1; got {batch_size}.")


def statistics(log_weights: Tensor) -> dict[str, Any]:
    """Return what log weights alone say of the draws, as the first arguments of a `Diagnosis`."""
    smoothed, k_hat = pareto_smooth(log_weights)
    num_samples = log_weights.numel()
    ess = effective_sample_size(smoothed)
    finite = log_weights[log_weights > -torch.inf]
    return {
        "num_samples": num_samples,
        "num_broken": num_samples - finite.numel(),
        "k_hat": k_hat,
        "ess": ess,
        "log_evidence": log_mean_weight(smoothed),
        "log_evidence_se": log_mean_error(ess, num_samples),
        "elbo": float(finite.mean()),
        "elbo_se": float(finite.std()) / math.sqrt(finite.numel()),
    }


def _annealing(
    svi: Fit,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    batch_size: int,
    vectorize: bool,
) -> dict[str, Any]:
    if not isinstance(svi, AdaAnnSVI):
        return {}
    history = svi.history
    found: dict[str, Any] = {
        "num_untracked": len(history.untracked),
        "num_stalled": len(history.stalled),
        "num_stages": sum(stage.inverse_temperature < 1 for stage in history.present_pass),
    }
    if svi.ladder is not None and svi.ladder.rungs:
        found["ladder"] = find_lost_parts(
            svi,
            *args,
            num_samples=_DRAWS_OF_A_RUNG * num_samples,
            batch_size=batch_size,
            vectorize=vectorize,
            **kwargs,
        )
    return found


def _thermodynamic(
    svi: Fit, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int, vectorize: bool
) -> ThermodynamicEstimate | None:
    if not isinstance(svi, AdaAnnSVI) or svi.inverse_temperature < 1:
        return None
    nodes = history_nodes(svi.history)
    if not nodes:
        return None
    last = final_node(svi, svi.path, args, kwargs, _NUM_FINAL_DRAWS, batch_size, vectorize)
    return integrate([*nodes, last])
