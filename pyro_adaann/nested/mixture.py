r"""A mixture of nested Laplace approximations, one of each mode of a posterior whose modes lie apart.

.. math:: q(z) = \sum_k s_k \, q_k(z), \qquad s_k \propto \frac1n \sum_i \frac{p(z_{ki})}{q_k(z_{ki})},
          \quad z_{ki} \sim q_k .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_adaann.nested.laplace import NestedLaplace

__all__ = ["LaplaceMixture"]


class LaplaceMixture(TorchDistribution):
    """A mixture of densities of vectors.

    :param parts: the m densities.
    :param log_shares: of them, ``(m,)``; they need not be normalized.

    Draws are of the first part's dtype.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(
        self,
        parts: Sequence[NestedLaplace],
        log_shares: Tensor,
        *,
        batch_shape: Size = Size(),  # noqa: B008 it cannot change
    ) -> None:
        self.parts, self.log_shares = list(parts), log_shares.double().log_softmax(0)
        super().__init__(batch_shape, self.parts[0].event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LaplaceMixture:
        """Return the density for a batch of draws."""
        return LaplaceMixture(self.parts, self.log_shares, batch_shape=Size(batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008 it cannot change
        """Return draws, from torch's global generator."""
        shape = self._extended_shape(Size(sample_shape))
        num = math.prod(shape[:-1])
        place = torch.multinomial(self.log_shares.exp(), num, replacement=True)
        z = torch.zeros(num, shape[-1], dtype=self.parts[0].dtype, device=place.device)
        for k, part in enumerate(self.parts):
            here = (place == k).nonzero().squeeze(-1)
            if len(here):
                z[here] = part.sample(Size([len(here)]))
        return z.reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density."""
        densities = torch.stack([part.log_prob(value) for part in self.parts], -1)
        return (densities + self.log_shares).logsumexp(-1)
