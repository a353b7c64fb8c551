r"""Moves that leave a tempered density invariant, for all particles at once.

Each takes points, an inverse temperature and what has been tuned, and returns the points after it and
every particle's probability of having been accepted. A proposal whose log density, or whose gradient on
the way, is not finite is refused.

**Hamiltonian Monte Carlo.** In whitened coordinates u, x = L u, with momentum v of unit mass: half a
step of v along :math:`L^\top \nabla \log p_t`, a step of u along v, and so on; accepted with
:math:`\min(1, e^{H - H'})`, :math:`H = -\log p_t(x) + |v|^2 / 2`. Every particle has a step size of its own,
drawn at random.

**Random walk.** :math:`x' = x + \epsilon L \xi` with normal :math:`\xi`; no gradient.

**Independence.** x' from the guide, whose density in its own coordinates is the base :math:`q_0`; accepted
with :math:`p_t(x') q_0(x) / (p_t(x) q_0(x'))`. Particles that move so exchange modes.

Sources: Neal, *MCMC using Hamiltonian dynamics* (2011); Buchholz, Chopin and Jacob, *Adaptive tuning of
Hamiltonian Monte Carlo within sequential Monte Carlo*, Bayesian Analysis 16 (2021); Gabrié, Rotskoff and
Vanden-Eijnden, *Adaptive Monte Carlo augmented with normalizing flows*, PNAS 119 (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from pyro_adaann.checks import check_count
from pyro_adaann.sampling.metric import Metric
from pyro_adaann.sampling.target import Points, TemperedTarget

__all__ = ["HMC", "SMALL_STEPS", "Move", "RandomWalk", "draw_base", "get_kernel", "independence_move"]

#: A `move_index` at which a move has small steps.
SMALL_STEPS = 5
#: After how many moves at one temperature a density counts as one of several scales.
_NUM_EASY_MOVES = 5
#: How many times the step may then be halved.
_NUM_HALVINGS = 5


class Move(Protocol):
    """What sequential Monte Carlo asks of a move; :class:`HMC` and :class:`RandomWalk` have it."""

    @property
    def target_acceptance(self) -> float:
        """The share of accepted proposals that the step size is adapted to."""

    @property
    def uses_gradient(self) -> bool:
        """Whether it follows the gradient of the log density."""

    def adapts_at(self, move_index: int) -> bool:
        """Return whether the acceptance of this move at a temperature says whether the step size fits."""

    def initial_step_size(self, dim: int) -> float:
        """Return the step size to begin with."""

    def __call__(
        self,
        target: TemperedTarget,
        inverse_temperature: float,
        points: Points,
        metric: Metric,
        step_size: float,
        generator: Generator,
        move_index: int = 0,
    ) -> tuple[Points, Tensor]:
        """Return the points after the move, and the acceptance probabilities, shape ``(n,)``.

        ``move_index`` counts the moves at this inverse temperature.
        """


def normal(like: Tensor, generator: Generator) -> Tensor:
    """Return standard normal noise of the shape, dtype and device of ``like``."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def uniform(num: int, like: Tensor, generator: Generator) -> Tensor:
    """Return ``num`` uniform random numbers of the dtype and device of ``like``."""
    return torch.rand(num, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def accept(
    points: Points, proposal: Points, log_ratio: Tensor, generator: Generator
) -> tuple[Points, Tensor]:
    """Return the points after Metropolis' choice, and the probabilities."""
    is_accepted, probability = _choose(log_ratio, generator)
    return points.where(is_accepted, proposal), probability


def _choose(log_ratio: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return Metropolis' choice and its probabilities; a ratio of NaN is a refusal."""
    log_ratio = torch.where(torch.isnan(log_ratio), -torch.inf, log_ratio)
    probability = log_ratio.clamp(max=0).exp()
    return uniform(len(log_ratio), log_ratio, generator) < probability, probability


def _log_ratio(target: TemperedTarget, points: Points, proposal: Points, t: float) -> Tensor:
    """Return log p_t(x') - log p_t(x), NaN unless the former is a number or minus infinity."""
    new = target.log_density(proposal.terms, t)
    return torch.where(new < torch.inf, new, torch.nan) - target.log_density(points.terms, t)


@dataclass(frozen=True)
class HMC:
    r"""Hamiltonian Monte Carlo for all particles at once.

    :param target_acceptance: in (0, 1).
    :param trajectory_length: in units of the particles' sd; a quarter of a normal density's period,
        :math:`\pi / 2`, forgets most.
    :param max_leapfrogs: the most gradients of one move.
    :param jitter: every particle's step size is uniform in ``(1 - jitter, 1 + jitter)`` times the tuned
        one, so that none is always in resonance, and narrow regions are entered by small steps.

    Where particles have not forgotten after five moves at one temperature, some regions are much
    narrower than others. Then every other move has a step up to 32 times smaller, for the narrow ones,
    and the rest have trajectories twice as long with every five moves, for the wide ones.
    """

    target_acceptance: float = 0.75
    trajectory_length: float = math.pi / 2
    max_leapfrogs: int = 16
    jitter: float = 0.5

    def __post_init__(self) -> None:
        check_count("max_leapfrogs", self.max_leapfrogs, 1)
        if not (0 < self.target_acceptance < 1 and 0 <= self.jitter < 1 and self.trajectory_length > 0):
            raise ValueError(
                f"Expected `target_acceptance` in (0, 1), `jitter` in [0, 1) and `trajectory_length` > 0; "
                f"got{self.target_acceptance}, {self.jitter} and {self.trajectory_length}."
            )

    @property
    def uses_gradient(self) -> bool:
        """Whether it follows the gradient of the log density: it does."""
        return True

    def adapts_at(self, move_index: int) -> bool:
        """Return whether this move at a temperature has the tuned step size, not a smaller one."""
        return move_index < _NUM_EASY_MOVES or move_index % 2 == 0

    def initial_step_size(self, dim: int) -> float:
        """Return the step size to begin with, which falls with the fourth root of the dimension."""
        return float(dim**-0.25)

    def __call__(
        self,
        target: TemperedTarget,
        inverse_temperature: float,
        points: Points,
        metric: Metric,
        step_size: float,
        generator: Generator,
        move_index: int = 0,
    ) -> tuple[Points, Tensor]:
        """Return the points after one trajectory, and the acceptance probabilities, shape ``(n,)``."""
        t, num = inverse_temperature, len(points.x)
        if points.gradient is None:
            points = target.evaluate_with_gradient(points.x, t)
        if self.adapts_at(move_index):
            length = self.trajectory_length * 2.0 ** (move_index // _NUM_EASY_MOVES)
            num_leapfrogs = max(1, min(self.max_leapfrogs, round(length / step_size)))
        else:
            step_size = step_size * 2.0 ** (-_NUM_HALVINGS * float(uniform(1, points.x, generator)))
            num_leapfrogs = self.max_leapfrogs
        spread = 1 + self.jitter * (2 * uniform(num, points.x, generator) - 1)
        step = (step_size * spread).unsqueeze(-1)
        momentum = start = normal(points.x, generator)
        new, is_finite = points, torch.ones(num, dtype=torch.bool, device=points.x.device)
        for _ in range(num_leapfrogs):
            momentum = momentum + 0.5 * step * metric.color_transposed(_gradient(new))
            new = target.evaluate_with_gradient(new.x + metric.color(step * momentum), t)
            assert new.gradient is not None
            is_finite &= torch.isfinite(new.gradient).all(-1)
            momentum = momentum + 0.5 * step * metric.color_transposed(_gradient(new))
        kinetic = 0.5 * (momentum.square() - start.square()).sum(-1)
        log_ratio = _log_ratio(target, points, new, t) - kinetic
        return accept(points, new, torch.where(is_finite, log_ratio, torch.nan), generator)


def _gradient(points: Points) -> Tensor:
    """Return the gradient, zero where it is not finite: such a trajectory is refused at its end."""
    assert points.gradient is not None
    return torch.nan_to_num(points.gradient, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class RandomWalk:
    """A random walk with the particles' covariance, for models without gradients.

    :param target_acceptance: in (0, 1); 0.3 is near the best in few and in many dimensions.
    """

    target_acceptance: float = 0.3

    @property
    def uses_gradient(self) -> bool:
        """Whether it follows the gradient of the log density: it does not."""
        return False

    def adapts_at(self, move_index: int) -> bool:
        """Return whether this move at a temperature has the tuned step size: all have."""
        return True

    def initial_step_size(self, dim: int) -> float:
        """Return the best step size for a normal density in many dimensions, 2.38 / sqrt(dim)."""
        return float(2.38 * dim**-0.5)

    def __call__(
        self,
        target: TemperedTarget,
        inverse_temperature: float,
        points: Points,
        metric: Metric,
        step_size: float,
        generator: Generator,
        move_index: int = 0,
    ) -> tuple[Points, Tensor]:
        """Return the points after one step, and the acceptance probabilities, shape ``(n,)``."""
        noise = metric.color(step_size * normal(points.x, generator))
        proposal = target.evaluate(points.x + noise)
        log_ratio = _log_ratio(target, points, proposal, inverse_temperature)
        return accept(points.without_gradient(), proposal, log_ratio, generator)


def independence_move(
    target: TemperedTarget,
    inverse_temperature: float,
    points: Points,
    generator: Generator,
    num_proposals: int = 1,
) -> tuple[Points, Tensor]:
    """Return the points after proposals from the guide, and mean acceptance probabilities, shape ``(n,)``.

    Proposals do not depend on the points, so that one batch evaluates all of them, whatever their number;
    then each is accepted or refused in turn. The target has the guide's flow as its coordinates.
    """
    assert target.flow is not None
    num = len(points.x)
    x = draw_base(target.flow.proposal, num_proposals * num, generator).to(points.x)
    if points.gradient is None:
        proposals = target.evaluate(x)
    else:
        proposals = target.evaluate_with_gradient(x, inverse_temperature)
    log_weights = _log_weights(target, points, inverse_temperature)
    rows = torch.arange(num, device=x.device)
    chosen, probabilities = rows, torch.zeros_like(log_weights)
    for index, log_weight in enumerate(_log_weights(target, proposals, inverse_temperature).split(num)):
        is_accepted, probability = _choose(log_weight - log_weights, generator)
        log_weights = torch.where(is_accepted, log_weight, log_weights)
        chosen = torch.where(is_accepted, (index + 1) * num + rows, chosen)
        probabilities = probabilities + probability / num_proposals
    return points.join(proposals)[chosen], probabilities


def _log_weights(target: TemperedTarget, points: Points, t: float) -> Tensor:
    """Return log p_t - log q, q that of proposals, NaN where log p_t is plus infinity."""
    log_density = target.log_density(points.terms, t)
    return torch.where(log_density < torch.inf, log_density, torch.nan) - target.proposal_log_prob(points.x)


def draw_base(base: Any, num_samples: int, generator: Generator) -> Tensor:
    """Return draws from a distribution, from ``generator`` instead of torch's global one."""
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        draws: Tensor = base.sample(torch.Size([num_samples]))
    return draws


def get_kernel(kernel: str | Move) -> Move:
    """Return the move of this name, or the move itself.

    :raises ValueError: if there is no move of this name.
    """
    if not isinstance(kernel, str):
        return kernel
    kinds: dict[str, Callable[[], Move]] = {"hmc": HMC, "random_walk": RandomWalk}
    if kernel not in kinds:
        raise ValueError(f"Expected `kernel` to be one of {sorted(kinds)} or a move; got {kernel!r}.")
    return kinds[kernel]()
