"""The coordinates of a fitted guide."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_adaann.annealing.tempering import first_density
from pyro_adaann.guide_status import expects_tempered
from pyro_adaann.sampling.density import UnconstrainedModel
from pyro_adaann.transforms.base import FlowTransform

__all__ = ["Flow", "guide_flow", "over_vector", "with_wide_tails"]

#: How much wider a coordinate of a proposal may be than the base, and the largest share of those that are.
_WIDER, _MOST_WIDE = 2.0, 0.25


class Flow:
    """The coordinates of a fitted guide: a base on x, and z = T(x).

    :param base: the guide's base distribution.
    :param transform: T.
    :param dim: number of coordinates.
    :param first: the density of z that path "bridge" starts from; by default that of the base.
    """

    def __init__(self, base: Any, transform: Any, dim: int, first: Any = None) -> None:
        self.base, self.transform = over_vector(base, dim), transform
        self.first = self.base if first is None else over_vector(first, dim)
        #: What proposals are drawn from.
        self.proposal = with_wide_tails(self.base)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z of shape ``(n, dim)`` and ``log|det dz/dx|`` of shape ``(n,)``."""
        if isinstance(self.transform, FlowTransform):
            return self.transform.forward_and_log_det(x)
        z = self.transform(x)
        log_det = self.transform.log_abs_det_jacobian(x, z)
        return z, sum_rightmost(log_det, log_det.dim() - 1).expand(len(x))

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        """Return x with T(x) = z, NaN where the inverse does not come back to z."""
        x: Tensor = self.transform.inv(z.clone())
        error = (self(x)[0] - z).abs().amax(-1)
        return torch.where((error <= 1e-2 * (1 + z.abs().amax(-1))).unsqueeze(-1), x, torch.nan)


def guide_flow(guide: Any, model: UnconstrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    """Return the coordinates of a guide.

    :raises ValueError: if it has none, or other latent variables than the model.
    """
    if not (hasattr(guide, "get_base_dist") and hasattr(guide, "get_transform")):
        raise ValueError(
            f"Expected a guide with a base and a transform, such as AutoPlanar, AutoRealNVP or Pyro's "
            f"AutoMultivariateNormal; got {type(guide).__name__}."
        )
    with torch.no_grad(), torch.random.fork_rng(), expects_tempered():
        guide(*args, **kwargs)  # a guide that has not run yet learns its sites
    names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    if names != list(model.sites) or guide.latent_dim != model.dim:
        raise ValueError(
            f"Expected the guide to have the latent sites of the model, {', '.join(model.sites)}, of "
            f"{model.dim} numbers in all; got {', '.join(names)}, of {guide.latent_dim}."
        )
    with torch.no_grad():
        return Flow(
            guide.get_base_dist(), guide.get_transform(*args, **kwargs), model.dim, first_density(guide)
        )


def with_wide_tails(base: Any) -> Any:
    """Return a normal base with, on average, one coordinate of a draw twice as wide; another base as it is.

    Where the guide's tail is too short its own draws come too seldom, and a chain that is there stays too
    long: the ratio of the densities has no bound.
    """
    normal = base.base_dist if isinstance(base, dist.Independent) else None
    if not isinstance(normal, dist.Normal) or base.event_shape != normal.batch_shape:
        return base
    share = min(1 / base.event_shape[0], _MOST_WIDE)
    loc, scale = normal.loc.unsqueeze(-1), normal.scale.unsqueeze(-1)
    widths = dist.Normal(loc, scale * scale.new_tensor([1.0, _WIDER]))
    parts = dist.Categorical(scale.new_tensor([1 - share, share]).expand(widths.batch_shape))
    return dist.MixtureSameFamily(parts, widths).to_event(1)


def over_vector(distribution: Any, dim: int) -> Any:
    """Return a distribution of vectors of length ``dim``.

    :raises ValueError: if the distribution is of something else.
    """
    event, batch = distribution.event_shape, distribution.batch_shape
    if not event and batch in ((), (1,), (dim,)):
        return distribution.expand([dim]).to_event(1)
    if event == (dim,) and not batch:
        return distribution
    raise ValueError(
        f"Expected `base` to be a distribution of numbers, or of vectors of length {dim}, the number of "
        f"unconstrained latent variables; got event shape {tuple(event)} and batch shape {tuple(batch)}."
    )
