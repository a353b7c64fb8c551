"""The scores of a guide's draws in its parameters, and the units of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.objectives.fixed_density import (
    flow_of,
    log_density_at_fixed_draws,
    score_of_base,
)
from pyro_adaann.objectives.sites import has_density
from pyro_adaann.objectives.traces import PARTICLE_PLATE, per_particle, sites_of
from pyro_adaann.processes.shares import are_worth_sending, in_shares
from pyro_adaann.steps.transformed import base_point, fixed_density_at, is_transformed_vector
from pyro_adaann.transforms.linear_maps import calls_of_linear_maps, gradients_of_calls, gradients_row_by_row
from pyro_adaann.transforms.outer import OuterProducts

__all__ = ["draw_scores", "joined_scores", "parameter_units", "score_matrix"]


def draw_scores(
    guide_trace: Trace, parameters: dict[str, Tensor], num_particles: int
) -> list[Tensor | list[OuterProducts]]:
    r"""Return :math:`\nabla_\phi \log q_\phi(z)` of every particle, its draws held fixed.

    For the weights of linear maps these are outer products, which are not multiplied out: for flows of this
    package that provide them, and for linear and masked linear modules in any other transformed distribution
    of a vector. Entries that a site masks add nothing.

    :param guide_trace: trace of the guide, with its graph.
    :param parameters: unconstrained parameters of the guide by name.
    :return: for every parameter a tensor of shape ``(num_particles, *shape)``, or the outer products whose
        sum it is.
    :raises ValueError: if a site of the guide has no density at a given point, or if the density does not
        depend on a parameter.
    """
    sums = _Sums(parameters, num_particles)
    rest: Tensor | float = 0.0
    for site in filter(has_density, sites_of(guide_trace)):
        fn, mask = _unmasked(site)
        transform = flow_of(fn)
        if transform is not None and all(p in sums for p in transform.parameters() if p.requires_grad):
            _add_flow(sums, site, fn, transform, mask)
        elif transform is None and is_transformed_vector(fn):
            _add_transformed(sums, site, fn, mask)
        else:
            log_q = _density(site, log_density_at_fixed_draws, fn, site["value"])
            rest = rest + per_particle(site, _masked(log_q, mask))
    if isinstance(rest, Tensor) and rest.requires_grad:
        sums.add_rows(rest.reshape(-1).expand(num_particles), list(parameters.values()))
    return sums.result()


def joined_scores(
    first: list[Tensor | list[OuterProducts]], second: list[Tensor | list[OuterProducts]]
) -> list[Tensor | list[OuterProducts]]:
    """Return :func:`draw_scores` of two sets of draws of one guide as those of one set."""
    joined: list[Tensor | list[OuterProducts]] = []
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            joined.append(torch.cat([_dense(a), _dense(b)]))
        else:
            joined.append(
                [
                    OuterProducts(torch.cat([p.left, q.left]), torch.cat([p.right, q.right]), p.mask)
                    for p, q in zip(a, b, strict=True)
                ]
            )
    return joined


def _dense(score: Tensor | list[OuterProducts]) -> Tensor:
    return score if isinstance(score, Tensor) else torch.stack([term.dense() for term in score]).sum(0)


def score_matrix(guide_trace: Trace, parameters: dict[str, Tensor], num_particles: int) -> Tensor:
    """Return :func:`draw_scores` multiplied out, shape ``(num_particles, number of parameters)``."""
    scores = draw_scores(guide_trace, parameters, num_particles)
    return torch.cat([_dense(score).reshape(num_particles, -1) for score in scores], dim=1)


def parameter_units(guide_trace: Trace, parameters: dict[str, Tensor]) -> Tensor:
    """Return what counts as a large change of every number, in the order of :func:`score_matrix`.

    Flows of this package define it; for other parameters it is 1.
    """
    units = {id(p): torch.ones_like(p) for p in parameters.values()}
    for site in filter(has_density, sites_of(guide_trace)):
        transform = flow_of(_unmasked(site)[0])
        found = {} if transform is None else transform.parameter_units()
        units.update((id(p), unit) for p, unit in found.items() if id(p) in units)
    return torch.cat([unit.detach().reshape(-1) for unit in units.values()])


class _Sums:
    """The scores of particles, added up from those of the points of several sites."""

    def __init__(self, parameters: dict[str, Tensor], num_particles: int) -> None:
        self._parameters = parameters
        self._num_particles = num_particles
        # Every contribution with the order that sorts its points by particle.
        self._terms: dict[int, list[tuple[Tensor | OuterProducts, Tensor | None]]] = {
            id(p): [] for p in parameters.values()
        }

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._terms

    def order(self, site: Any, shape: torch.Size) -> Tensor | None:
        """Return the points of a site with batch shape ``shape``, flat, in the order of particles.

        None if that is the order they are in.
        """
        index = torch.arange(self._num_particles, device=site["value"].device)
        for frame in site["cond_indep_stack"]:
            if frame.name == PARTICLE_PLATE:
                if -frame.dim == len(shape):
                    return None
                index = index.reshape((-1,) + (1,) * (-1 - frame.dim))
        return index.expand(shape).reshape(-1).argsort(stable=True)

    def add(self, key: int, gradient: Tensor | OuterProducts, order: Tensor | None) -> None:
        """Add the gradients of points in the parameter with ``id`` ``key``."""
        self._terms[key].append((gradient, order))

    def add_rows(self, log_q: Tensor, parameters: Sequence[Tensor]) -> None:
        """Add the gradients of every entry of ``log_q``, ``(num_particles,)``: many backward passes."""
        for parameter, gradient in zip(parameters, gradients_row_by_row(log_q, parameters), strict=True):
            if gradient is not None:
                self.add(id(parameter), gradient, None)

    def result(self) -> list[Tensor | list[OuterProducts]]:
        """Return the scores in every parameter."""
        idle = [name for name, p in self._parameters.items() if not self._terms[id(p)]]
        if idle:
            raise ValueError(
                f"Expected a guide whose density depends on all its parameters; that of this one does not on "
                f"{', '.join(idle)}. A point estimate (AutoDelta) has no density: use Trace_ELBO."
            )
        return [self._sum(parameter) for parameter in self._parameters.values()]

    def _sum(self, parameter: Tensor) -> Tensor | list[OuterProducts]:
        terms = self._terms[id(parameter)]
        outer = [(term, order) for term, order in terms if isinstance(term, OuterProducts)]
        if len(outer) == len(terms):
            num_terms = sum(len(term.left) for term, _ in outer) // self._num_particles
            rows, columns = parameter.shape[-2:]
            # What the products of two draws cost, factor by factor and multiplied out.
            if num_terms**2 * (rows + columns) < rows * columns:
                return [part for term, order in outer for part in self._split(term, order)]
        total = parameter.new_zeros(self._num_particles, *parameter.shape)
        for term, order in terms:
            total += self._multiplied_out(term, order)
        return total

    def _by_particle(self, values: Tensor, order: Tensor | None) -> Tensor:
        """Return values of points as ``(num_particles, points of each, ...)``."""
        values = values.detach() if order is None else values.detach()[order]
        return values.unflatten(0, (self._num_particles, -1))

    def _split(self, term: OuterProducts, order: Tensor | None) -> list[OuterProducts]:
        left, right = self._by_particle(term.left, order), self._by_particle(term.right, order)
        pairs = zip(left.unbind(1), right.unbind(1), strict=True)
        return [OuterProducts(*pair, term.mask) for pair in pairs]

    def _multiplied_out(self, term: Tensor | OuterProducts, order: Tensor | None) -> Tensor:
        if isinstance(term, Tensor):
            return self._by_particle(term, order).sum(1)
        left, right = self._by_particle(term.left, order), self._by_particle(term.right, order)
        product = left.movedim(1, -1) @ right.movedim(1, -2)
        return product if term.mask is None else product * term.mask


def _add_flow(sums: _Sums, site: Any, fn: Any, transform: Any, mask: Tensor | None) -> None:
    """Add the scores of a flow of this package."""
    x = _point(transform, site["value"])
    gradients = _point_gradients(transform, x, score_of_base(fn, x))
    order = sums.order(site, x.shape[:-1])
    is_counted = None if mask is None else mask.expand(x.shape[:-1]).reshape(-1)
    for parameter, gradient in gradients.items():
        sums.add(id(parameter), _selected(gradient, is_counted, 0.0), order)


def _point_gradients(transform: Any, x: Tensor, base_score: Tensor) -> dict[Tensor, Tensor | OuterProducts]:
    """Return the gradients of log q at fixed images of points; each process computes those of its share."""

    def run(x: Tensor, base_score: Tensor) -> dict[Tensor, Tensor | OuterProducts]:
        found: dict[Tensor, Tensor | OuterProducts] = transform.point_gradients(x, base_score)
        return found

    x, base_score = (rows.reshape(-1, rows.shape[-1]) for rows in (x, base_score))
    if not are_worth_sending(len(x) * sum(parameter.numel() for parameter in transform.parameters())):
        return run(x, base_score)
    own: dict[Tensor, Tensor | OuterProducts] = {}

    def run_as_tensors(x: Tensor, base_score: Tensor) -> list[Tensor]:
        own.update(run(x, base_score))
        return [part for g in own.values() for part in _factors(g)]

    all_rows = iter(in_shares(run_as_tensors, x, base_score))
    found: dict[Tensor, Tensor | OuterProducts] = {}
    for parameter, gradient in own.items():
        if isinstance(gradient, OuterProducts):
            found[parameter] = OuterProducts(next(all_rows), next(all_rows), gradient.mask)
        else:
            found[parameter] = next(all_rows)
    return found


def _factors(gradient: Tensor | OuterProducts) -> list[Tensor]:
    return [gradient.left, gradient.right] if isinstance(gradient, OuterProducts) else [gradient]


def _add_transformed(sums: _Sums, site: Any, fn: Any, mask: Tensor | None) -> None:
    """Add the scores of a transformed distribution, in its linear maps by one backward pass."""
    x = _density(site, base_point, fn, site["value"])
    with torch.enable_grad(), calls_of_linear_maps(x.shape[:-1]) as calls:
        log_q, is_known = fixed_density_at(fn, x)
    log_q = _masked(log_q, mask)
    if not log_q.requires_grad:
        return
    parameters = list(sums._parameters.values())
    found, on_graph = gradients_of_calls(log_q, [c for c in calls if c.weight in sums], parameters)
    order = sums.order(site, x.shape[:-1])
    for key, terms in found.items():
        for term in terms:
            # NaN marks a draw without a score.
            sums.add(key, _selected(term, is_known.reshape(-1), torch.nan), order)
    others = [p for p in parameters if id(p) in on_graph - set(found)]
    if others:
        sums.add_rows(per_particle(site, log_q), others)


def _selected(
    gradient: Tensor | OuterProducts, is_selected: Tensor | None, other: float
) -> Tensor | OuterProducts:
    """Return the gradients of some points, and ``other`` for the rest."""
    if is_selected is None:
        return gradient
    if isinstance(gradient, OuterProducts):
        # Both factors: the values left out may be infinite, and zero times infinity is NaN.
        left = _select(gradient.left, is_selected, other)
        return OuterProducts(left, _select(gradient.right, is_selected, other), gradient.mask)
    return _select(gradient, is_selected, other)


def _select(values: Tensor, is_selected: Tensor, other: float) -> Tensor:
    return torch.where(is_selected.reshape((-1,) + (1,) * (values.dim() - 1)), values, other)


def _unmasked(site: Any) -> tuple[Any, Tensor | None]:
    """Return the distribution of a site without its masks, and which entries count, None for all."""
    fn, masks = site["fn"], [site["mask"]]
    while hasattr(fn, "_mask"):
        masks.append(fn._mask)
        fn = fn.base_dist
    found = [torch.as_tensor(mask, device=site["value"].device) for mask in masks if mask is not None]
    result = None
    for mask in found:
        result = mask.bool() if result is None else result & mask.bool()
    return fn, result


def _masked(log_q: Tensor, mask: Tensor | None) -> Tensor:
    return log_q if mask is None else torch.where(mask, log_q, 0.0)


def _density(site: Any, evaluate: Any, *args: Any) -> Tensor:
    """Return ``evaluate(*args)``.

    :raises ValueError: if the site has no density at a given point.
    """
    try:
        result: Tensor = evaluate(*args)
    except (NotImplementedError, KeyError) as error:  # what Pyro's flows without an inverse raise
        raise ValueError(
            f"Expected a guide with a density at any point; site {site['name']!r} has none ({error}). "
            f"Use AutoPlanar, AutoRealNVP, AutoIAFNormal or a normal guide."
        ) from error
    return result


def _point(transform: Any, value: Tensor) -> Tensor:
    """Return the point that a flow has mapped to ``value``."""
    # Without a graph, or an inverse that is known without one is computed anew.
    with torch.no_grad():
        made = transform.recall(value)
        point: Tensor = transform.inv(value) if made is None else made[0]
    return point.detach()
