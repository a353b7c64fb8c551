r"""The tempered density that the particles are to follow, in the coordinates in which they move.

Along a path (:mod:`pyro_adaann.annealing.paths`) the density at inverse temperature t is

.. math:: \log p_t(z) = w_\mathrm{prior}(t) \log p(z) + w_\mathrm{lik}(t) \log p(x \mid z)
          + w_\mathrm{base}(t) \log q_0(z).

With a flow T the particles are points x with z = T(x), and the density is pulled back,
:math:`\log p_t(T(x)) + \log|\det J_T(x)|`. The Jacobian is the same at every t.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.annealing.paths import Path
from pyro_adaann.sampling.density import UnconstrainedModel
from pyro_adaann.sampling.flow import Flow, over_vector

__all__ = ["Points", "TemperedTarget"]


@dataclass(frozen=True)
class Points:
    """Particles with what is known about them.

    :param x: their positions, shape ``(n, dim)``.
    :param terms: log prior, log likelihood, log base and log determinant of the flow, shape ``(4, n)``.
    :param gradient: of the tempered log density at one inverse temperature, shape ``(n, dim)``, or None.
    """

    x: Tensor
    terms: Tensor
    gradient: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Points:
        gradient = None if self.gradient is None else self.gradient[index]
        return Points(self.x[index], self.terms[:, index], gradient)

    def join(self, others: Points) -> Points:
        """Return these points and others after them."""
        gradient = None
        if self.gradient is not None and others.gradient is not None:
            gradient = torch.cat([self.gradient, others.gradient])
        return Points(torch.cat([self.x, others.x]), torch.cat([self.terms, others.terms], dim=1), gradient)

    def where(self, is_new: Tensor, new: Points) -> Points:
        """Return these points with those of ``new`` where ``is_new``, shape ``(n,)``."""
        rows = is_new.unsqueeze(-1)
        gradient = None
        if self.gradient is not None and new.gradient is not None:
            gradient = torch.where(rows, new.gradient, self.gradient)
        x, terms = torch.where(rows, new.x, self.x), torch.where(is_new, new.terms, self.terms)
        return Points(x, terms, gradient)

    def without_gradient(self) -> Points:
        """Return the points alone, as they are after the temperature has changed."""
        return replace(self, gradient=None)


class TemperedTarget:
    """Tempered log densities of a model along a path, and their gradients.

    :param model: the model in unconstrained coordinates.
    :param path: the path.
    :param base: the density q0 of z where the path or the start needs one; `"guide"` for that of the
        flow itself.
    :param flow: the coordinates, those of the model if None.
    """

    def __init__(
        self, model: UnconstrainedModel, path: Path, base: Any = None, flow: Flow | None = None
    ) -> None:
        self.model, self.path, self.flow = model, path, flow
        self.base = base if base is None or base == "guide" else over_vector(base, model.dim)
        #: How many points have been evaluated.
        self.num_evaluations = 0

    def evaluate(self, x: Tensor) -> Points:
        """Return points with their terms and no gradient."""
        with torch.no_grad():
            return Points(x, self._terms(x))

    def evaluate_with_gradient(self, x: Tensor, inverse_temperature: float) -> Points:
        """Return points with their terms and the gradient of the log density at an inverse temperature."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            terms = self._terms(x)
            total = self.log_density(terms, inverse_temperature)
            # A point that breaks keeps its own gradient broken, and no other.
            (gradient,) = torch.autograd.grad(total.sum(), x, allow_unused=True)
        gradient = torch.zeros_like(x) if gradient is None else gradient
        return Points(x.detach(), terms.detach(), gradient)

    def _terms(self, x: Tensor) -> Tensor:
        self.num_evaluations += len(x)
        z, log_det = (x, x.new_zeros(len(x))) if self.flow is None else self.flow(x)
        prior, likelihood = self.model.log_densities(z)
        base = x.new_zeros(len(x))
        if isinstance(self.base, str):
            base = self.guide_log_prob(x) - log_det
        elif self.base is not None:
            base = _log_prob(self.base, z)
        return torch.stack([prior, likelihood, base, log_det])

    def guide_log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of the guide's base at x, in the coordinates of the flow."""
        assert self.flow is not None
        return _log_prob(self.flow.base, x)

    def proposal_log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of proposals from the guide at x, in the coordinates of the flow."""
        assert self.flow is not None
        return _log_prob(self.flow.proposal, x)

    def log_density(self, terms: Tensor, inverse_temperature: float) -> Tensor:
        """Return log p_t in the coordinates of the flow, shape ``(n,)``, from terms ``(4, n)``."""
        path, t = self.path, inverse_temperature
        weights = (path.prior_weight(t), path.likelihood_weight(t), path.base_weight(t), 1.0)
        return _combine(weights, terms)

    def log_factor(self, terms: Tensor) -> Tensor:
        """Return d/dt log p_t, which along these paths does not depend on t, shape ``(n,)``."""
        path = self.path
        return _combine((1 - path.prior, 1 - path.likelihood, -path.base), terms[:3])

    def log_start(self, terms: Tensor, starts_at_base: bool) -> Tensor:
        """Return the log density of the initial draws, in the coordinates of the flow."""
        return terms[2 if starts_at_base else 0] + terms[3]

    def to_model(self, x: Tensor) -> Tensor:
        """Return the unconstrained coordinates z of points x."""
        with torch.no_grad():
            return x if self.flow is None else self.flow(x)[0]


def _log_prob(base: Any, x: Tensor) -> Tensor:
    """Return the log density of a base, NaN at points that are not finite, which its checks would refuse."""
    is_finite = torch.isfinite(x).all(-1)
    log_prob: Tensor = base.log_prob(torch.where(is_finite.unsqueeze(-1), x, 0.0))
    return torch.where(is_finite, log_prob, torch.nan)


def _combine(weights: tuple[float, ...], terms: Tensor) -> Tensor:
    # A term of weight 0 does not count even where it is infinite.
    kept = [weight * term for weight, term in zip(weights, terms, strict=True) if weight]
    return torch.stack(kept).sum(0) if kept else torch.zeros_like(terms[0])
