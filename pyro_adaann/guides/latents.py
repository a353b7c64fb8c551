"""Between the values of a guide's sites and the one vector of free numbers that it draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["constrained", "free_numbers", "log_prob_at"]


def free_numbers(guide: AutoContinuous, values: Mapping[str, Tensor]) -> Tensor:
    """Return values of all sites, draws along a first dimension, as vectors ``(num_draws, latent_dim)``.

    :param guide: one that has run, or has been initialized.
    :raises ValueError: if a site is missing.
    """
    sites = [site for _, site in guide.prototype_trace.iter_stochastic_nodes()]
    missing = [site["name"] for site in sites if site["name"] not in values]
    if missing:
        raise ValueError(f"Expected values of all latent variables; got none of {', '.join(missing)}.")
    parts = [biject_to(site["fn"].support).inv(values[site["name"]]) for site in sites]
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=-1)


def constrained(guide: AutoContinuous, latents: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield every site with its values of ``latents``, ``(n, latent_dim)``: free, constrained."""
    position = 0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        shape = guide._unconstrained_shapes[name]
        column = latents[:, position : position + shape.numel()].reshape(-1, *shape)
        position += shape.numel()
        yield site, column, biject_to(site["fn"].support)(column)


def log_prob_at(guide: AutoContinuous, posterior: Any, values: Mapping[str, Tensor]) -> Tensor:
    """Return the log density of values of all sites, by that of the vector of free numbers.

    :param posterior: of the vector.
    :return: shape ``(num_draws,)``, in the coordinates of the model.
    :raises ValueError: if a site is missing.
    """
    latents = free_numbers(guide, values)
    log_prob: Tensor = posterior.log_prob(latents)
    for site, free, value in constrained(guide, latents):
        log_jacobian = biject_to(site["fn"].support).log_abs_det_jacobian(free, value)
        log_prob = log_prob - log_jacobian.reshape(len(latents), -1).sum(-1)
    return log_prob
