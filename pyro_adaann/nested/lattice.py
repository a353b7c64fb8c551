"""The lattice of a nested Laplace approximation, from one node outwards to where little mass is left."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_adaann.nested.density import Density
from pyro_adaann.nested.laplace import NestedLaplace
from pyro_adaann.nested.modes import find_modes
from pyro_adaann.weights import weighted_mean

__all__ = ["moments_of", "spread"]

#: Distance of neighboring nodes in sds, and how far below the highest one a node has none, in nats.
_SPACING, _DEPTH = 0.3, 14.0
#: Of every node, below the highest one, in nats.
_LEAST_MASS = 8.0
#: Nodes at most, and rounds of neighbors.
_MAX_NODES, _MAX_ROUNDS = 3000, 200
#: Draws nearest to the first node that say where to start, and how wide the inner coordinates are there.
_NUM_NEAREST = 200
#: Of the covariance of the inner coordinates: a proposal must not be too narrow.
_WIDER = 1.05


def spread(
    density: Density,
    outer: list[int],
    z: Tensor,
    log_weights: Tensor,
    goes_on: Callable[[], bool] = lambda: True,
) -> NestedLaplace | None:
    """Return the nested Laplace approximation of a density, None if no mode is found or it is stopped.

    :param density: the density.
    :param outer: indices of the outer coordinates, in order.
    :param z: draws with weights that tell where it is, shape ``(n, d)``.
    :param log_weights: of them.
    :param goes_on: whether there is time for more nodes.
    """
    flood = _Flood(density, outer, *_start(density, outer, z, log_weights))
    for _ in range(_MAX_ROUNDS):
        if not goes_on():
            return None
        if not flood.go_on():
            break
    return flood.result()


def _start(
    density: Density, outer: list[int], z: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first node, with inner coordinates to start from, their sds there, and the spacing."""
    kept = log_weights > -torch.inf
    z, log_weights = z[kept].double(), log_weights[kept].double()
    center, sd = moments_of(z[:, outer], log_weights)
    distance = ((z[:, outer] - center) / sd).square().sum(-1)
    near = distance.topk(min(_NUM_NEAREST, len(z)), largest=False).indices
    point, scale = moments_of(z[near], log_weights[near])
    point[outer] = center
    return point, scale.clamp(min=1e-6), _SPACING * sd


class _Flood:
    """Nodes and their modes, from the first one to all neighbors of those that have mass.

    :param point: the first node, with inner coordinates to start from, shape ``(d,)``.
    :param scale: sds that coordinates may have there, ``(d,)``.
    :param spacing: of the lattice, ``(j,)``.
    """

    def __init__(
        self, density: Density, outer: list[int], point: Tensor, scale: Tensor, spacing: Tensor
    ) -> None:
        self._density, self._spacing = density, spacing
        self._outer = torch.tensor(outer, device=point.device)
        inner = [i for i in range(density.dim) if i not in outer]
        self._inner = torch.tensor(inner, device=point.device)
        self._origin = point[self._outer]
        self._nodes = torch.zeros(1, len(outer), dtype=torch.long, device=point.device)
        self._modes = find_modes(density, self._inner, point.unsqueeze(0), scale[self._inner].unsqueeze(0))
        self._seen, self._num_before = {tuple(self._nodes[0].tolist())}, 0
        self._is_cut = False

    @property
    def _has_mass(self) -> Tensor:
        log_mass = self._modes.log_mass
        return log_mass > log_mass.max() - _DEPTH

    def go_on(self) -> bool:
        """Add the neighbors of the latest nodes that have mass; return whether there are any."""
        latest = self._has_mass.nonzero().squeeze(-1)
        latest = latest[latest >= self._num_before]
        new, parents = [], []
        for place, node in zip(latest.tolist(), self._nodes[latest].tolist(), strict=True):
            for axis, step in itertools.product(range(len(node)), (-1, 1)):
                neighbor = (*node[:axis], node[axis] + step, *node[axis + 1 :])
                if neighbor not in self._seen:
                    self._seen.add(neighbor)
                    new.append(neighbor)
                    parents.append(place)
        if not new:
            return False
        if len(self._seen) > _MAX_NODES:
            # Its own draws do not show what lies beyond the edge of a lattice that is cut off.
            log_mass = self._modes.log_mass
            self._is_cut = bool((log_mass[latest] > log_mass.max() - _LEAST_MASS).any())
            return False
        parent = self._modes.at(torch.tensor(parents, device=self._nodes.device))
        nodes = torch.tensor(new, device=self._nodes.device)
        start = parent.points.clone()
        start[:, self._outer] = self._origin + self._spacing * nodes
        self._num_before = len(self._nodes)
        self._modes = self._modes.join(find_modes(self._density, self._inner, start, parent.sd))
        self._nodes = torch.cat([self._nodes, nodes])
        return True

    def result(self) -> NestedLaplace | None:
        """Return the approximation, None if hardly any node has a mode or nodes of much mass are left out."""
        if self._is_cut or self._has_mass.sum() <= 2 * len(self._outer):
            return None
        # With the nodes around those that have mass, and more mass than they have: at the edge of a lattice
        # the density falls to zero, and the weights of draws there rise.
        kept = self._modes.log_mass > -torch.inf
        modes = self._modes.at(kept)
        return NestedLaplace(
            self._outer,
            self._origin,
            self._spacing,
            self._nodes[kept],
            modes.points[:, self._inner],
            torch.linalg.cholesky(_WIDER * modes.covariance),
            modes.log_mass.clamp(min=float(modes.log_mass.max()) - _LEAST_MASS),
        )


def moments_of(z: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of the columns of weighted draws."""
    mean = weighted_mean(z, log_weights)
    return mean, weighted_mean((z - mean).square(), log_weights).sqrt()
