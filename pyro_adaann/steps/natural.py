"""A loss whose gradient is the natural one: few steps, each of them long and judged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.poutine import Trace
from torch import Tensor

from pyro_adaann.objectives.traces import captured_parameters, finite_log_weights, subsampled_plate
from pyro_adaann.steps.direction import NaturalDirection
from pyro_adaann.steps.scores import parameter_units, score_matrix

__all__ = ["TraceNaturalKL_ELBO"]

#: How damping falls after a step that was kept, grows after one that was not, and between what.
_EASE, _STIFFEN = 0.5, 4.0
_MIN_DAMPING, _MAX_DAMPING = 1e-2, 1e6
#: Directions that are tried in one step.
_MAX_TRIALS = 6
#: Standard errors by which a trial may fall behind.
_MAX_FALL = 2.0
#: Where the weights have less than this relative variance, that of a trial may be so many times as large,
#: and so much larger.
_VARIANCE_NEAR, _VARIANCE_FACTOR, _VARIANCE_SLACK = 1.0, 1.5, 0.02


class TraceNaturalKL_ELBO(Trace_ELBO):
    r"""A divergence that covers the mass, with its natural gradient in place of the gradient.

    .. math:: \delta = (F + \lambda D)^{-1}
              \frac1n \sum_i r(w_i) \, \nabla_\phi \log q_\phi(z_i), \qquad
              F = \frac1n \sum_i \nabla \log q_\phi(z_i) \, \nabla \log q_\phi(z_i)^\top

    with draws :math:`z_i` of the guide, held fixed, and their weights :math:`w_i`, truncated as in
    :class:`~pyro_adaann.TraceMixedKL_ELBO` and of mean one. Where the guide has too little,
    :math:`r(w) = w - 1`, as in the forward KL divergence, which covers the mass; where it has too much,
    :math:`r(w) = \log w`, as in the reverse one, which draws strays in (down to -8). That is the f-divergence
    :math:`E_q f(w)` with :math:`f''(w) = 1 / (w \min(1, w))`. An optimizer that scales every parameter by
    itself, as Adam does, takes thousands of steps to move mass from one mode to another: that takes all
    layers together. F knows how they act together. D is the diagonal of F and a hundredth of its mean, in
    units of the parameters that a flow of this package knows.

    `loss_and_grads` leaves :math:`-\delta` as the gradient, so the optimizer is
    ``pyro.optim.SGD({"lr": 1.0})``. A direction is tried on a fresh batch of draws first, and is
    kept unless the affinity of guide and posterior falls beyond noise; then :math:`\lambda` grows and the
    next one is tried. A step costs two evaluations of the model, without gradient, and the scores of
    every draw, ``num_particles`` times the number of parameters. It is meant for guides of up to some 100,000
    parameters and for some hundred steps. Parameters of the model are not moved.

    The loss that is reported is minus the ELBO, as of `Trace_ELBO`.

    :param num_particles: n; a few hundred, since every step trusts them far more than a step of Adam.
    :param max_kl: bound on :math:`\tfrac12 \delta^\top F \delta`, the divergence of one step, in nats.
    :param damping: :math:`\lambda` at the first step; later steps adapt it.
    :param vectorize_particles: must be true.
    :param kwargs: the others of `pyro.infer.Trace_ELBO`.
    :raises ValueError: if an argument is out of range; at a step, if a plate is subsampled, the model has
        parameters, or the guide has no density at a given point or one that does not depend on all of its
        parameters.

    Source: Amari, *Natural gradient works efficiently in learning*, Neural Computation 10 (1998);
    Marquardt, *An algorithm for least-squares estimation of nonlinear parameters*, SIAM J. 11 (1963), for
    the damping; Salimans and Knowles, *Fixed-form variational posterior approximation through stochastic
    linear regression*, Bayesian Analysis 8 (2013), for the direction as a regression on the scores.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_adaann import AutoPlanar
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> pyro.clear_param_store()  # a new fit
        >>> pyro.set_rng_seed(0)
        >>> guide = AutoPlanar(model, num_transforms=8, base_scale=2.0)
        >>> svi = SVI(model, guide, pyro.optim.SGD({"lr": 1.0}), TraceNaturalKL_ELBO(300))
        >>> losses = [svi.step() for _ in range(30)]
        >>> losses[-1] < 0.2
        True
    """

    def __init__(
        self,
        num_particles: int = 500,
        *,
        max_kl: float = 0.02,
        damping: float = 0.1,
        vectorize_particles: bool = True,
        **kwargs: Any,
    ) -> None:
        if not vectorize_particles:
            raise ValueError(
                "Expected `vectorize_particles` to be true, since the weight of a particle depends on the "
                "others; got False. For a model that does not vectorize use Trace_ELBO."
            )
        if num_particles < 2:
            raise ValueError(f"Expected `num_particles` >= 2; got {num_particles}.")
        for name, value in (("max_kl", max_kl), ("damping", damping)):
            if not 0 < value < math.inf:
                raise ValueError(f"Expected `{name}` to be positive and finite; got {value}.")
        super().__init__(num_particles, vectorize_particles=True, **kwargs)
        self.max_kl = max_kl
        #: The present damping.
        self.damping = damping

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the natural gradient is not the gradient of a loss."""
        raise NotImplementedError(
            "Expected `loss_and_grads`, which SVI and AdaAnnSVI call; a natural gradient is not the gradient "
            "of a differentiable loss. Use TraceMixedKL_ELBO with an optimizer of torch's."
        )

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return minus the ELBO, and add the negative direction to the parameters' ``grad``."""

        def without_graph(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return model(*args, **kwargs)

        model_trace, guide_trace = next(iter(self._get_traces(without_graph, guide, args, kwargs)))
        _check_plates(model_trace, guide_trace)
        parameters = _parameters(model_trace, guide_trace)
        log_weight, is_kept = finite_log_weights(model_trace, guide_trace)
        scores = score_matrix(guide_trace, parameters, len(log_weight))
        direction = NaturalDirection(scores, log_weight, parameter_units(guide_trace, parameters))

        def draw() -> Tensor:
            with torch.no_grad(), warnings.catch_warnings():
                # A broken draw has weight zero; it may be one of a step that is not taken.
                warnings.filterwarnings("ignore", message="Encountered")
                traces = Trace_ELBO._get_traces(self, model, guide, args, kwargs)
                return finite_log_weights(*next(iter(traces)))[0]

        steps = self._search(direction, list(parameters.values()), log_weight, draw)
        for parameter, step in zip(parameters.values(), steps, strict=True):
            parameter.grad = -step if parameter.grad is None else parameter.grad - step
        return float(-torch.where(is_kept, log_weight, 0.0).mean())

    def _search(
        self, direction: NaturalDirection, parameters: Sequence[Tensor], log_weight: Tensor, draw: Any
    ) -> list[Tensor]:
        """Return the first direction that stands the trial, or zeros; adapt the damping."""
        values = [parameter.detach().clone() for parameter in parameters]
        sizes = [parameter.numel() for parameter in parameters]
        for _ in range(_MAX_TRIALS):
            flat = direction.solve(self.damping, self.max_kl)
            steps = [
                part.view_as(p).to(p.dtype) for part, p in zip(flat.split(sizes), parameters, strict=True)
            ]
            try:
                with torch.no_grad():
                    for parameter, step in zip(parameters, steps, strict=True):
                        parameter.add_(step)
                    trial = draw()
            finally:
                with torch.no_grad():
                    for parameter, value in zip(parameters, values, strict=True):
                        parameter.copy_(value)
            if is_not_worse(trial, log_weight):
                self.damping = max(self.damping * _EASE, _MIN_DAMPING)
                return steps
            self.damping = min(self.damping * _STIFFEN, _MAX_DAMPING)
        return [torch.zeros_like(parameter) for parameter in parameters]


def is_not_worse(trial: Tensor, present: Tensor) -> bool:
    r"""Whether the guide of one batch of log weights is as close to p as that of another, but for noise.

    Close in the affinity :math:`\int \sqrt{p q} = E_q \sqrt{p / q}`, whose estimate has a finite variance
    whatever p and q. The variance of the weights alone would not do: it is as small as before when a mode
    has been lost, and it grows at first where a guide that is too narrow widens. Near the end, where most
    draws count, it is the finer measure, and is asked too.
    """
    (affinity, noise, variance), (before, noise_before, variance_before) = map(_moments, (trial, present))
    if -math.inf in (affinity, before):
        return before == -math.inf
    if variance_before < _VARIANCE_NEAR and variance > _VARIANCE_FACTOR * variance_before + _VARIANCE_SLACK:
        return False
    return affinity >= before - _MAX_FALL * math.sqrt((noise + noise_before) / len(present))


def _moments(log_weights: Tensor) -> tuple[float, float, float]:
    """Return the log of the mean root of the weights, and the relative variances of root and weight."""
    log_weights = torch.where(torch.isfinite(log_weights), log_weights, -torch.inf).double()
    log_num = math.log(len(log_weights))
    half, one, two = (float((power * log_weights).logsumexp(0)) - log_num for power in (0.5, 1.0, 2.0))
    if one == -math.inf:
        return half, math.inf, math.inf
    return half, math.expm1(max(one - 2 * half, 0.0)), math.expm1(max(two - 2 * one, 0.0))


def _check_plates(model_trace: Trace, guide_trace: Trace) -> None:
    frame = subsampled_plate(model_trace, guide_trace)
    if frame is not None:
        raise ValueError(
            f"Expected every plate in full; got {frame.size} of {frame.full_size} in plate "
            f"{frame.name!r}. The weights of a random part of the data are not those of the "
            f"posterior: use Trace_ELBO."
        )


def _parameters(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
    """Return the parameters of the guide that are trained, by name."""
    names = [name for name, value in captured_parameters(model_trace).items() if value.requires_grad]
    if names:
        raise ValueError(
            f"Expected a model without parameters, since the natural gradient is that of the guide; got "
            f"{', '.join(names)}. Use Trace_ELBO or TraceMixedKL_ELBO."
        )
    # Once each: a guide may hold a flow under two names.
    found = {id(value): (name, value) for name, value in captured_parameters(guide_trace).items()}
    return {name: value for name, value in found.values() if value.requires_grad}
