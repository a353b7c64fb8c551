"""The log likelihood of every single observation, as leave-one-out cross-validation needs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_adaann.diagnostics.guide_draws import DrawBatch, GuideDraws
from pyro_adaann.objectives.traces import sites_of

__all__ = ["pointwise_log_likelihood"]


def pointwise_log_likelihood(draws: GuideDraws, batch: DrawBatch, name: str) -> Tensor:
    r"""Return the log likelihood of the observations at one site, for every draw of a batch.

    Discrete sites that the model enumerates are summed out, if each belongs to one observation:

    .. math:: \log p(x_i \mid z) = \log \sum_k p(x_i \mid k, z) \, p(k \mid z)

    :return: shape ``(n,) + batch shape of the site``.
    :raises ValueError: if an enumerated site is shared between observations, which then have no
        likelihood each.
    """
    site = batch.model_trace.nodes[name]
    num_samples = len(batch.log_p)
    log_prob = site["log_prob"]
    if draws.enumerated_names:
        log_prob = _sum_out(draws, batch, site, draws.plate_nesting + (num_samples > 1))
    shape = draws.prototype.nodes[name]["log_prob"].shape
    return draws.as_draws(name, log_prob, shape, num_samples)


def _sum_out(draws: GuideDraws, batch: DrawBatch, site: Any, nesting: int) -> Tensor:
    def enum_dims(site: Any) -> set[int]:
        shape = site["log_prob"].shape
        return {dim for dim in range(-len(shape), -nesting) if shape[dim] > 1}

    dims = enum_dims(site)
    nodes = batch.model_trace.nodes
    local = [
        nodes[name] for name in draws.enumerated_names if nodes[name]["infer"].get("_enumerate_dim") in dims
    ]
    shared = [s for s in sites_of(batch.model_trace) if s is not site and enum_dims(s) & dims]
    is_own = (
        len(local) == len(shared) == len(dims)
        and all(enum_dims(s) <= dims for s in local)
        and all(s["cond_indep_stack"] == site["cond_indep_stack"] for s in local)
    )
    if not is_own:
        raise ValueError(
            f"Expected every enumerated site to belong to one observation; got one that others share with "
            f"{site['name']!r}, whose observations then have no log likelihood each. Pass "
            f"`log_likelihood=False`."
        )
    total = site["log_prob"]
    for s in local:
        total = total + s["log_prob"]
    return total.logsumexp(sorted(dims)) if dims else total
