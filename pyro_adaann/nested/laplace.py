r"""The nested Laplace approximation as a density: outer coordinates on a lattice, the others normal.

Every node g of a lattice of the outer coordinates u, :math:`\delta` apart, has the mode :math:`y_g` of the
others, their covariance :math:`L_g L_g^\top` and the Laplace approximation :math:`m_g` of their integral,

.. math:: q(u, y) = \sum_g m_g \prod_j \frac{B\bigl((u_j - u_{gj}) / \delta_j\bigr)}{\delta_j}
          \; N\bigl(y;\, y(u), L(u) L(u)^\top\bigr), \qquad B(x) = \max(0, 1 - |x|),

with y(u) and L(u) between the nodes by linear interpolation, the diagonal of L by that of its logarithm.

Source: Rue, Martino and Chopin, *Approximate Bayesian inference for latent Gaussian models by using
integrated nested Laplace approximations*, JRSS B 71 (2009), section 3; here as a proposal.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

__all__ = ["NestedLaplace"]

#: Numbers of the factors that are made at a time.
_MAX_NUMBERS = 2**22


class NestedLaplace(TorchDistribution):
    """A density of vectors with normal conditionals; see the module.

    :param outer: indices of the j outer coordinates among all d, in order.
    :param origin: where the node of indices 0 lies, shape ``(j,)``.
    :param spacing: distances of neighboring nodes, ``(j,)``.
    :param nodes: indices of the m nodes, integers ``(m, j)``.
    :param loc: of the inner coordinates at each, ``(m, d - j)``.
    :param factor: Cholesky factors of their covariance, ``(m, d - j, d - j)``.
    :param log_mass: of the nodes, ``(m,)``; they need not be normalized.

    All in double precision; draws are of ``dtype``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(
        self,
        outer: Tensor,
        origin: Tensor,
        spacing: Tensor,
        nodes: Tensor,
        loc: Tensor,
        factor: Tensor,
        log_mass: Tensor,
        *,
        dtype: torch.dtype = torch.double,
        batch_shape: Size = Size(),  # noqa: B008 it cannot change
    ) -> None:
        self.outer, self.origin, self.spacing, self.nodes = outer, origin, spacing, nodes
        self.loc, self.factor, self.log_mass = loc, factor, log_mass.log_softmax(0)
        self.dtype = dtype
        dim = len(outer) + loc.shape[-1]
        is_outer = torch.zeros(dim, dtype=torch.bool, device=outer.device)
        is_outer[outer] = True
        self._inner = (~is_outer).nonzero().squeeze(-1)
        self._log_scale = factor.diagonal(dim1=-2, dim2=-1).log()
        self._unit = factor / self._log_scale.exp().unsqueeze(-2)
        # Where each node is in a box of the lattice; all others are -1, and the box has a margin.
        self._first = nodes.amin(0) - 1
        shape = (nodes.amax(0) - self._first + 2).tolist()
        self._place = torch.full(shape, -1, device=nodes.device)
        self._place[tuple((nodes - self._first).T)] = torch.arange(len(nodes), device=nodes.device)
        corners = list(itertools.product((0, 1), repeat=len(outer)))
        self._corners = torch.tensor(corners, device=nodes.device)
        super().__init__(batch_shape, Size([dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NestedLaplace:
        """Return the density for a batch of draws."""
        return NestedLaplace(
            self.outer,
            self.origin,
            self.spacing,
            self.nodes,
            self.loc,
            self.factor,
            self.log_mass,
            dtype=self.dtype,
            batch_shape=Size(batch_shape),
        )

    def with_conditionals(self, loc: Tensor, factor: Tensor) -> NestedLaplace:
        """Return the density with other locations and factors at the nodes."""
        parts = (self.outer, self.origin, self.spacing, self.nodes, loc, factor, self.log_mass)
        return NestedLaplace(*parts, dtype=self.dtype)

    def residuals(self, z: Tensor) -> Tensor:
        """Return the inner coordinates of points in standard deviations, ``(n, d - j)``, uncorrelated."""
        return torch.cat([self._standardize(part)[0] for part in z.split(self._rows)])

    @torch.no_grad()
    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008 it cannot change
        """Return draws, from torch's global generator."""
        shape = self._extended_shape(Size(sample_shape))
        num = math.prod(shape[:-1])
        node = torch.multinomial(self.log_mass.exp(), num, replacement=True)
        # The sum of two uniform numbers has the density of a hat.
        hat = torch.rand(2, num, len(self.outer), dtype=torch.double, device=node.device).sum(0) - 1
        u = self.origin + self.spacing * (self.nodes[node] + hat)
        parts = [self._draw_inner(part) for part in u.split(self._rows)]
        return torch.cat(parts).to(self.dtype).reshape(shape)

    def _draw_inner(self, u: Tensor) -> Tensor:
        _, loc, factor = self._at(u)
        noise = torch.randn(*loc.shape, 1, dtype=torch.double, device=loc.device)
        z = loc.new_empty(len(u), self.event_shape[0])
        z[:, self.outer] = u
        z[:, self._inner] = loc + (factor @ noise).squeeze(-1)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, minus infinity beyond the lattice."""
        rows = value.reshape(-1, self.event_shape[0]).double()
        found = torch.cat([self._log_prob(part) for part in rows.split(self._rows)])
        return found.reshape(value.shape[:-1])

    def _log_prob(self, z: Tensor) -> Tensor:
        e, mass, log_det = self._standardize(z)
        normal = -0.5 * e.square().sum(-1) - log_det - 0.5 * e.shape[-1] * math.log(2 * math.pi)
        return mass.log() - self.spacing.log().sum() + normal

    def _standardize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return residuals of points, the mass around them, and log determinants of the factors there."""
        mass, loc, factor = self._at(z[:, self.outer])
        residual = (z[:, self._inner] - loc).unsqueeze(-1)
        e = torch.linalg.solve_triangular(factor, residual, upper=False).squeeze(-1)
        return e, mass, factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def _rows(self) -> int:
        return max(_MAX_NUMBERS // self.loc.shape[-1] ** 2, 1)

    def _at(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the nodes around outer coordinates give: mass, location and factor."""
        position = (u - self.origin) / self.spacing
        position = torch.where(position.isfinite(), position, torch.inf)
        low = position.floor()
        share = (position - low).nan_to_num()
        limits = torch.tensor(self._place.shape, device=u.device) - 1
        index = (low - self._first).clamp(min=-1, max=float(limits.max())).long().unsqueeze(1) + self._corners
        is_inside = ((index >= 0) & (index <= limits)).all(-1)
        index = index.clamp(min=0).minimum(limits)
        node = torch.where(is_inside, self._place[tuple(index.movedim(-1, 0))], -1)
        hats = torch.where(self._corners.bool(), share.unsqueeze(1), 1 - share.unsqueeze(1)).prod(-1)
        hats, node = torch.where(node >= 0, hats, 0.0), node.clamp(min=0)
        mass = (hats * self.log_mass.exp()[node]).sum(1)
        # Beside a node without a mode the others have its part.
        parts = hats / hats.sum(1, keepdim=True).clamp(min=1e-30)
        loc = torch.einsum("nc,nck->nk", parts, self.loc[node])
        log_scale = torch.einsum("nc,nck->nk", parts, self._log_scale[node])
        unit = sum(parts[:, c, None, None] * self._unit[node[:, c]] for c in range(node.shape[1]))
        unit = torch.as_tensor(unit)
        # Far away no node has a part.
        unit = torch.where((hats.sum(1) > 0)[:, None, None], unit, torch.eye(len(self._inner)).to(unit))
        return mass, loc, unit * log_scale.exp().unsqueeze(-2)
