"""The groups of an ArviZ data set, as tensors, and the dimensions of their variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.export.pointwise import pointwise_log_likelihood
from pyro_adaann.objectives.traces import sites_of

__all__ = ["Groups", "collect_posterior", "collect_prior", "observed_data", "site_dims"]

#: For every group its variables.
Groups = dict[str, dict[str, Tensor]]


class _Collector:
    """Lists of tensors by group and name, put together at the end."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, str], list[Tensor]] = {}

    def add(self, group: str, name: str, value: Tensor) -> None:
        self.parts.setdefault((group, name), []).append(value)

    def groups(self) -> Groups:
        result: Groups = {}
        for (group, name), values in self.parts.items():
            result.setdefault(group, {})[name] = torch.cat(values)
        return result


def collect_posterior(
    draws: GuideDraws,
    num_samples: int,
    batch_size: int,
    *,
    posterior_predictive: bool,
    log_likelihood: bool,
) -> Groups:
    """Return posterior, sample stats and on request posterior predictive and log likelihood."""
    collector = _Collector()
    observed = _observed_names(draws.prototype)
    for batch in draws.batches(num_samples, batch_size):
        num = len(batch.log_p)
        collector.add("sample_stats", "log_p", batch.log_p)
        collector.add("sample_stats", "log_q", batch.log_q)
        collector.add("sample_stats", "log_weight", batch.log_weights)
        for name in draws.latent_names:
            collector.add("posterior", name, draws.values(batch.guide_trace, name, num))
        for name in _deterministic_names(draws.prototype):
            if not (draws.enumerated_names and _is_enumerated(draws, batch.model_trace, name, num)):
                collector.add("posterior", name, draws.values(batch.model_trace, name, num))
        if log_likelihood:
            for name in observed:
                value = pointwise_log_likelihood(draws, batch, name)
                collector.add("log_likelihood", name, value)
        if posterior_predictive and observed:
            trace = draws.predict(batch)
            for name in observed:
                collector.add("posterior_predictive", name, draws.values(trace, name, num))
    return collector.groups()


def collect_prior(draws: GuideDraws, num_samples: int, batch_size: int) -> Groups:
    """Return prior and prior predictive draws, discrete sites included."""
    collector = _Collector()
    names = [*draws.latent_names, *draws.enumerated_names, *_deterministic_names(draws.prototype)]
    for trace, num in draws.prior(num_samples, batch_size):
        for name in names:
            collector.add("prior", name, draws.values(trace, name, num))
        for name in _observed_names(draws.prototype):
            collector.add("prior_predictive", name, draws.values(trace, name, num))
    return collector.groups()


def observed_data(draws: GuideDraws) -> dict[str, Tensor]:
    """Return the observations, in the full shape of their sites."""
    nodes = draws.prototype.nodes
    return {name: nodes[name]["value"] for name in _observed_names(draws.prototype)}


def _names(trace: Trace, accept: Callable[[Any], bool]) -> list[str]:
    return [site["name"] for site in sites_of(trace) if site["is_observed"] and accept(site)]


def _deterministic_names(trace: Trace) -> list[str]:
    return _names(trace, lambda site: site["infer"].get("_deterministic", False))


def _observed_names(trace: Trace) -> list[str]:
    # The value of a pyro.factor site is empty.
    return _names(
        trace, lambda site: not (site["infer"].get("_deterministic") or isinstance(site["fn"], dist.Unit))
    )


def _is_enumerated(draws: GuideDraws, trace: Trace, name: str, num_samples: int) -> bool:
    numel = draws.prototype.nodes[name]["value"].numel()
    return trace.nodes[name]["value"].numel() not in (numel, num_samples * numel)


def site_dims(
    trace: Trace, names: Sequence[str], user_dims: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the names of the dimensions of sites: plates, those of the user, or ``site_dim_0``.

    :param trace: a run of the model.
    :param names: of the sites.
    :param user_dims: for a site the names of its dimensions outside plates, or of all.
    :raises ValueError: if their number is neither.
    """
    return {name: _dims_of(trace.nodes[name], list(user_dims.get(name, ()))) for name in names}


def _dims_of(site: Any, given: list[str]) -> list[str]:
    name, shape = site["name"], site["value"].shape
    if given and len(given) == len(shape):
        return given
    dims: list[str | None] = [None] * len(shape)
    # By default all dimensions of a deterministic site are event dimensions, also those of plates.
    event_dim = 0 if site["infer"].get("_deterministic") else site["fn"].event_dim
    for frame in site["cond_indep_stack"]:
        index = len(shape) - event_dim + frame.dim if frame.vectorized else -1
        if index >= 0 and shape[index] == frame.size:
            dims[index] = frame.name
    free = [index for index, dim in enumerate(dims) if dim is None]
    if given and len(given) != len(free):
        raise ValueError(
            f"Expected `dims` of {name!r} to name {len(free)} dimensions outside plates, or all "
            f"{len(shape)}; got {given}."
        )
    for index, dim in zip(free, given or [f"{name}_dim_{index}" for index in free], strict=True):
        dims[index] = dim
    return [str(dim) for dim in dims]
