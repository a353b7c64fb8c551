r"""Many fits of the same flow to the same density, as one: a leading trial dimension in everything.

A trial of the studies is a small fit whose steps cost overhead, not arithmetic. Trials that share model
and schedule therefore run together: parameters have shape ``(trials, ...)``, particles ``(trials,
particles, d)``, the loss is the sum over trials, and Adam works number by number, so that every trial is
what it would be alone. Every trial has an inverse temperature of its own, and is left as it is once it has
taken its steps at 1.

The flows are those of the package, parameter for parameter: trials start from its stacks, and are taken
out again as such. The loss is that of `Trace_ELBO`; unlike in `AdaAnnSVI`, no particle's gradient is bounded.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_adaann import AnnealingSchedule
from pyro_adaann.transforms import FlowTransform, PlanarStack, RealNVPStack
from pyro_adaann.transforms.kernels.planar import constrain

__all__ = ["Flows", "Planars", "RealNVPs", "Trials", "fit_together"]


class Flows(ABC):
    """Flows of one architecture, one for each trial.

    :param stacks: what every trial starts from; not changed.
    """

    def __init__(self, stacks: Sequence[FlowTransform]) -> None:
        self.stacks = list(stacks)
        names = [name for name, _ in self.stacks[0].named_parameters()]
        self.parameters: dict[str, Tensor] = {
            name: torch.stack([stack.get_parameter(name).detach() for stack in self.stacks]).requires_grad_()
            for name in names
        }

    @abstractmethod
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` of shape ``(trials, particles, d)``; also return the log-determinants."""

    @torch.no_grad()
    def push(self, x: Tensor) -> Tensor:
        """Map ``x`` without gradient, for when no log-determinant is asked for."""
        return self(x)[0]

    def score(self, x: Tensor, base_score: Tensor) -> Tensor:
        """Return the score of log q at the images of ``x``, given that of the base at ``x``."""
        raise NotImplementedError(f"{type(self).__name__} has no score of its own draws; use Planars.")

    def write_back(self) -> list[FlowTransform]:
        """Write the parameters into the stacks and return them."""
        with torch.no_grad():
            for name, values in self.parameters.items():
                for stack, value in zip(self.stacks, values, strict=True):
                    stack.get_parameter(name).copy_(value)
        return self.stacks


class Planars(Flows):
    """Stacks of planar layers, :class:`~pyro_adaann.transforms.PlanarStack`."""

    @classmethod
    def make(cls, num_trials: int, dim: int, num_transforms: int, base_scale: float) -> Planars:
        """Return new stacks for the base N(0, base_scale^2)."""
        stacks = [PlanarStack(dim, num_transforms) for _ in range(num_trials)]
        for stack in stacks:
            stack.reset_parameters(torch.zeros(dim), torch.full((dim,), base_scale))
        return cls(stacks)

    def _constrained(self) -> tuple[Tensor, Tensor, Tensor]:
        u, w, b = (self.parameters[name] for name in ("u", "w", "b"))
        return constrain(u.flatten(0, 1), w.flatten(0, 1)).view_as(u), w, b

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _PlanarLayers.apply(x, *self._constrained())

    @torch.no_grad()
    def push(self, x: Tensor) -> Tensor:
        z = _columns_of_points(x)
        u, w, b = (_columns(p) for p in self._constrained())
        scratch = np.empty_like(z[0])
        _apply(z, u, w, b, itertools.repeat(scratch))
        return torch.from_numpy(z.transpose(1, 2, 0))

    @torch.no_grad()
    def score(self, x: Tensor, base_score: Tensor) -> Tensor:
        """Return the score of log q at the images of ``x``, given that of the base at ``x``.

        A layer and its inverse are the identity plus a term of rank one; the score follows the layers.
        """
        z, s = _columns_of_points(x), _columns_of_points(base_score)
        u, w, b = (_columns(p) for p in self._constrained())
        h = np.empty((len(b), *z.shape[1:]), z.dtype)
        _apply(z, u, w, b, h)
        gram = (u * w).sum(1)
        slope = 1 - h * h
        ratio = slope / (1 + gram * slope)
        for layer in range(len(b)):
            along = sum(u[layer, k] * s[k] for k in range(len(s)))
            s += (
                ratio[layer]
                * (2 * gram[layer] * h[layer] / (1 + gram[layer] * slope[layer]) - along)
                * w[layer]
            )
        return torch.from_numpy(s.transpose(1, 2, 0).copy())


class _PlanarLayers(torch.autograd.Function):
    """Layer after layer in NumPy, whose calls cost a third of torch's; the gradient goes back likewise.

    ``x`` has shape ``(trials, particles, d)`` and needs no gradient. Arrays below have layers first, then
    coordinates: ``u[l, k]`` is ``(trials, 1)`` and ``z[k]`` is ``(trials, particles)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        u_, w_, b_ = (_columns(p) for p in (u, w, b))
        z = _columns_of_points(x)
        h = np.empty((len(b_), *z.shape[1:]), z.dtype)
        _apply(z, u_, w_, b_, h)
        gram = (u_ * w_).sum(1)
        ctx.arrays = u_, w_, h, z, gram
        # 1 + gram (1 - h^2)
        log_det = np.log((1 + gram) - gram * h * h).sum(0)
        return torch.from_numpy(z.transpose(1, 2, 0).copy()), torch.from_numpy(log_det)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        u, w, h, y, gram = ctx.arrays
        grad_z = _columns_of_points(grad_y)
        slope = 1 - h * h
        ratio = grad_log_det.numpy() / (1 + gram * slope)
        grad_gram = np.einsum("lrn,lrn->lr", ratio, slope)[..., None]
        grad_h = ratio * h * (-2 * gram)
        grad_u, grad_w = grad_gram[:, None] * w, grad_gram[:, None] * u
        grad_b = np.empty_like(gram)
        z = y.copy()
        dims = range(len(z))
        for layer in range(len(h) - 1, -1, -1):
            grad_a = grad_h[layer]
            for k in dims:
                z[k] -= u[layer, k] * h[layer]
                grad_u[layer, k, :, 0] += np.einsum("rn,rn->r", h[layer], grad_z[k])
                grad_a += u[layer, k] * grad_z[k]
            grad_a *= slope[layer]
            grad_b[layer, :, 0] = grad_a.sum(-1)
            for k in dims:
                grad_w[layer, k, :, 0] += np.einsum("rn,rn->r", grad_a, z[k])
                grad_z[k] += w[layer, k] * grad_a
        return None, _rows(grad_u), _rows(grad_w), torch.from_numpy(grad_b[..., 0].T.copy())


def _apply(z: np.ndarray, u: np.ndarray, w: np.ndarray, b: np.ndarray, h: Iterable[np.ndarray]) -> None:
    """Overwrite the points ``z`` by their images, and one array of ``h`` a layer by its activations."""
    dims = range(len(z))
    for u_l, w_l, b_l, a in zip(u, w, b, h, strict=False):
        np.multiply(w_l[0], z[0], out=a)
        for k in dims[1:]:
            a += w_l[k] * z[k]
        a += b_l
        np.tanh(a, a)
        for k in dims:
            z[k] += u_l[k] * a


def _columns_of_points(points: Tensor) -> np.ndarray:
    """A copy of ``(trials, particles, d)`` as ``(d, trials, particles)``."""
    return np.array(points.detach().numpy().transpose(2, 0, 1), order="C")


def _columns(parameter: Tensor) -> np.ndarray:
    """``(trials, layers, d)`` to ``(layers, d, trials, 1)``, and without d likewise."""
    array = np.moveaxis(parameter.detach().numpy(), 0, -1)
    return np.ascontiguousarray(array)[..., None]


def _rows(gradient: np.ndarray) -> Tensor:
    """The way back of `_columns`."""
    return torch.from_numpy(np.ascontiguousarray(gradient[..., 0].transpose(2, 0, 1)))


class RealNVPs(Flows):
    """Stacks of coupling layers, :class:`~pyro_adaann.transforms.RealNVPStack`."""

    stacks: list[FlowTransform]

    @classmethod
    def make(cls, num_trials: int, dim: int, num_transforms: int, hidden_dim: int) -> RealNVPs:
        """Return new stacks whose networks have two hidden layers of ``hidden_dim`` units."""
        hidden_dims = [hidden_dim, hidden_dim]
        return cls([RealNVPStack(dim, num_transforms, hidden_dims) for _ in range(num_trials)])

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x.shape[-1] // 2
        copied, mapped = x.split([first, x.shape[-1] - first], dim=-1)
        num_transforms = sum(self.parameters[f"networks.{i}.weights.0"].shape[1] for i in (0, 1))
        log_det = x.new_zeros(x.shape[:-1])
        for layer in range(num_transforms):
            log_scale, shift = self._networks(layer, copied.unsqueeze(1)).unbind(1)
            log_scale = torch.tanh(log_scale)
            copied, mapped = torch.addcmul(shift, mapped, log_scale.exp()), copied
            log_det = log_det + log_scale.sum(-1)
        halves = (copied, mapped) if num_transforms % 2 == 0 else (mapped, copied)
        return torch.cat(halves, dim=-1), log_det

    def _networks(self, layer: int, hidden: Tensor) -> Tensor:
        kind, index = layer % 2, layer // 2
        for i in range(3):
            weight, bias = (self.parameters[f"networks.{kind}.{name}.{i}"] for name in ("weights", "biases"))
            hidden = (torch.relu(hidden) if i else hidden) @ weight[:, index] + bias[:, index]
        return hidden


def _truncated_weights(log_weights: Tensor) -> Tensor:
    """Importance weights of every trial, none above the sum divided by the root of their number."""
    limit = log_weights.logsumexp(1, keepdim=True) - 0.5 * math.log(log_weights.shape[1])
    return log_weights.minimum(limit).softmax(1)


@dataclass(frozen=True)
class Trials:
    """The trials when all have ended."""

    stacks: list[FlowTransform]
    #: Inverse temperatures of every trial, and the optimizer steps it took.
    inverse_temperatures: list[list[float]]
    num_steps: list[int]


def fit_together(
    flows: Flows,
    log_density: Callable[[Tensor], Tensor],
    schedule: AnnealingSchedule,
    *,
    base_scale: float,
    learning_rate: float,
    num_initial_steps: int,
    num_steps_per_stage: int,
    num_particles: int = 100,
    num_variance_samples: int = 1000,
    forward_weight: float | None = None,
    num_final_steps: int = 0,
) -> Trials:
    """Anneal every trial to 1 and return it after its ``num_steps_per_stage`` steps there.

    A schedule that is constant at 1 is no annealing: ``num_initial_steps`` steps.

    :param log_density: of points ``(..., d)``, normalized or not.
    :param base_scale: of the base N(0, base_scale^2) of all coordinates.
    :param forward_weight: a share of the forward divergence in the loss, as in `TraceMixedKL_ELBO`; None is
        `Trace_ELBO`.
    :param num_final_steps: further steps of all trials at 1, the learning rate halved after every quarter.
    """
    num_trials, dim = len(flows.stacks), flows.stacks[0].input_dim
    optim = torch.optim.Adam(flows.parameters.values(), lr=learning_rate)
    paths = [[schedule.initial_inverse_temperature] for _ in range(num_trials)]
    num_steps = [0] * num_trials
    final = {name: value.detach().clone() for name, value in flows.parameters.items()}
    running = list(range(num_trials))

    def take(steps: int) -> None:
        temperatures = torch.tensor([path[-1] for path in paths]).unsqueeze(-1)
        for _ in range(steps):
            x = base_scale * torch.randn(num_trials, num_particles, dim)
            z, log_det = flows(x)
            log_p = temperatures * log_density(z)
            loss = -(log_det + log_p).mean(1).sum()
            if forward_weight is not None:
                log_q = -0.5 * (x / base_scale).square().sum(-1) - log_det
                weights = _truncated_weights((log_p - log_q).detach())
                factor = 2 * forward_weight - 1 - forward_weight * num_particles * weights
                # Its gradient is that of log q at fixed draws.
                fixed = -log_det - (flows.score(x, -x / base_scale**2) * z).sum(-1)
                loss = (1 - forward_weight) * loss + (factor * fixed).mean(1).sum()
            optim.zero_grad()
            loss.backward()
            optim.step()
        for trial in running:
            num_steps[trial] += steps

    def stop_finished() -> None:
        for trial in [i for i in running if paths[i][-1] >= 1]:
            for name, value in flows.parameters.items():
                final[name][trial] = value.detach()[trial]
            running.remove(trial)

    take(num_initial_steps)
    stop_finished()
    while running:
        with torch.no_grad():
            log_factors = None
            if schedule.needs_log_factor:
                x = base_scale * torch.randn(num_trials, num_variance_samples, dim)
                log_factors = log_density(flows.push(x))
        for trial in running:
            draws = None if log_factors is None else log_factors[trial]
            paths[trial].append(schedule.next(paths[trial][-1], draws))
        take(num_steps_per_stage)
        stop_finished()
    with torch.no_grad():
        for name, value in final.items():
            flows.parameters[name].copy_(value)
    running = list(range(num_trials))
    for _ in range(4):
        take(num_final_steps // 4)
        optim.param_groups[0]["lr"] /= 2
    return Trials(flows.write_back(), paths, num_steps)
