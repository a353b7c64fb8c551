"""The scores of a guide in its parameters, draw by draw, and the units of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.objectives.fixed_density import fixed_log_density, flow_of, has_density, score_of_flow
from pyro_adaann.objectives.traces import PARTICLE_PLATE, sites_of
from pyro_adaann.transforms.outer import OuterProducts

__all__ = [
    "parameter_units",
    "score_matrix",
]

#: Backward passes that run together for the scores of guides that are no flow of this package.
_ROWS_AT_ONCE = 100


def score_matrix(guide_trace: Trace, parameters: dict[str, Tensor], num_particles: int) -> Tensor:
    r"""Return :math:`\nabla_\phi \log q_\phi(z)` of every particle, its draws held fixed.

    :param guide_trace: trace of the guide, with its graph.
    :param parameters: unconstrained parameters of the guide by name.
    :return: shape ``(num_particles, number of parameters)``, one column for each number.
    :raises ValueError: as :func:`fixed_log_density` does; or if the density does not depend on a parameter.
    """
    columns = {id(p): p.new_zeros(num_particles, p.numel()) for p in parameters.values()}
    met: set[int] = set()
    others = Trace()
    for site in filter(has_density, sites_of(guide_trace)):
        transform = flow_of(site["fn"])
        if transform is None or any(id(p) not in columns for p in transform.parameters() if p.requires_grad):
            others.add_node(site["name"], **site)
            continue
        x = _point(transform, site["value"])
        gradients = transform.point_gradients(x, -score_of_flow(site["fn"], transform, x), -1.0)
        particle = _particle_of_points(site, x.shape[:-1], num_particles)
        for parameter, gradient in gradients.items():
            met.add(id(parameter))
            gradient = gradient.dense() if isinstance(gradient, OuterProducts) else gradient
            columns[id(parameter)].index_add_(0, particle, gradient.reshape(len(gradient), -1))
    if len(others.nodes):
        log_q = fixed_log_density(others).expand(num_particles)
        if log_q.requires_grad:
            met |= _add_rows(log_q, list(parameters.values()), columns)
    idle = [name for name, parameter in parameters.items() if id(parameter) not in met]
    if idle:
        raise ValueError(
            f"Expected a guide whose density depends on all its parameters; that of this one does not on "
            f"{', '.join(idle)}. A point estimate (AutoDelta) has no density: use Trace_ELBO."
        )
    return torch.cat(list(columns.values()), dim=1)


def parameter_units(guide_trace: Trace, parameters: dict[str, Tensor]) -> Tensor:
    """Return what counts as a large change of every number, in the order of :func:`score_matrix`.

    A flow of this package knows; for other parameters it is 1.
    """
    units = {id(p): torch.ones_like(p) for p in parameters.values()}
    for site in filter(has_density, sites_of(guide_trace)):
        transform = flow_of(site["fn"])
        found = {} if transform is None else transform.parameter_units()
        units.update((id(p), unit) for p, unit in found.items() if id(p) in units)
    return torch.cat([unit.detach().reshape(-1) for unit in units.values()])


def _add_rows(log_q: Tensor, parameters: Sequence[Tensor], columns: dict[int, Tensor]) -> set[int]:
    """Add the gradients of every entry of ``log_q`` to its row, many backward passes at once.

    Return which parameters are on its graph.
    """
    met: set[int] = set()
    num = len(log_q)
    for start in range(0, num, _ROWS_AT_ONCE):
        rows = range(start, min(start + _ROWS_AT_ONCE, num))
        seeds = torch.eye(num, dtype=log_q.dtype, device=log_q.device)[rows.start : rows.stop]
        found = torch.autograd.grad(
            log_q, list(parameters), seeds, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                met.add(id(parameter))
                columns[id(parameter)][rows.start : rows.stop] += gradient.reshape(len(rows), -1)
    return met


def _point(transform: Any, value: Tensor) -> Tensor:
    """Return the point that a flow has mapped to ``value``."""
    made = transform.recall(value)
    return (transform.inv(value) if made is None else made[0]).detach()


def _particle_of_points(site: Any, shape: torch.Size, num_particles: int) -> Tensor:
    """Return which particle every point of a site with batch shape ``shape`` belongs to."""
    index = torch.arange(num_particles, device=site["value"].device)
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE:
            index = index.reshape((-1,) + (1,) * (-1 - frame.dim))
    return index.expand(shape).reshape(-1)
