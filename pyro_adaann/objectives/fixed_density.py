r"""The log density of a guide at its own draws, held fixed.

Along the path of a reparameterized draw :math:`z = T_\phi(\varepsilon)` the gradient of
:math:`\log q_\phi(z)` has two parts,

.. math:: \frac{d}{d\phi} \log q_\phi(z) = \partial_\phi \log q_\phi(z)\big|_z
          + s \cdot \frac{d z}{d\phi}, \qquad s = \nabla_z \log q_\phi(z).

Weighted draws, broken draws and path derivatives need the first one alone. A deep planar stack has no
cheap inverse; at its own draws none is needed, since the score s is propagated forward through the layers.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.objectives.sites import has_density
from pyro_adaann.objectives.traces import as_numbers, per_particle, sites_of

__all__ = [
    "fixed_log_density",
    "flow_of",
    "log_density_at_fixed_draws",
    "score_of_base",
    "score_of_flow",
    "site_log_density",
]


def fixed_log_density(guide_trace: Trace) -> Tensor:
    r"""Return a number per particle with the gradient of :math:`\log q_\phi(z)` at fixed z, shape ``(n,)``.

    Its value is not that of :math:`\log q`.

    :raises ValueError: if a site of the guide has no density at a given point.
    """
    total: Any = 0.0
    for site in filter(has_density, sites_of(guide_trace)):
        try:
            log_q = site_log_density(site)
        except (NotImplementedError, KeyError) as error:  # what Pyro's flows without an inverse raise
            raise ValueError(
                f"Expected a guide with a density at any point; site {site['name']!r} has none ({error}). "
                f"Use AutoPlanar, AutoRealNVP, AutoIAFNormal or a normal guide."
            ) from error
        total = total + per_particle(site, log_q)
    return as_numbers(total, guide_trace)


def site_log_density(site: Any) -> Tensor:
    """Return :func:`log_density_at_fixed_draws` of a site, zero where the site is masked."""
    log_q: Tensor = scale_and_mask(log_density_at_fixed_draws(site["fn"], site["value"]), mask=site["mask"])
    return log_q


def log_density_at_fixed_draws(fn: Any, value: Tensor) -> Tensor:
    """Return a number per draw of a distribution with the gradient of its log density at fixed draws."""
    transform = flow_of(fn)
    if transform is None:
        return fn.log_prob(value.detach())
    with torch.enable_grad():
        made = transform.recall(value)
        if made is None or not made[2].requires_grad:
            x = transform.inv(value).detach()
            y, log_det = transform.forward_and_log_det(x)
        else:
            # On the graph of the draws, but not by way of `value`: its gradient is cut where the model has
            # none.
            x, y, log_det = made
        score = score_of_flow(fn, transform, x.detach())
        is_known = torch.isfinite(score).all(-1)
        score = torch.where(is_known.unsqueeze(-1), score, 0.0)
        return torch.where(is_known, -log_det - (score * y).sum(-1), 0.0)


def flow_of(fn: Any) -> Any:
    """Return the flow of this package that a distribution is made of, or None."""
    transforms = getattr(fn, "transforms", [])
    return transforms[0] if len(transforms) == 1 and hasattr(transforms[0], "score") else None


def score_of_flow(fn: Any, transform: Any, x: Tensor) -> Tensor:
    """Return the score of log q at the images of ``x``."""
    return transform.score(x, score_of_base(fn, x))


def score_of_base(fn: Any, x: Tensor) -> Tensor:
    """Return the score of the base of a flow at ``x``."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        (score,) = torch.autograd.grad(fn.base_dist.log_prob(x).sum(), x)
    return score
