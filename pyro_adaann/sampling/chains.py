"""Markov chains of the posterior that alternate proposals from a guide with a move in its coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from pyro_adaann.annealing.paths import JOINT
from pyro_adaann.diagnostics.model_and_guide import Fit, get_model_and_guide
from pyro_adaann.sampling.density import UnconstrainedModel
from pyro_adaann.sampling.flow import guide_flow
from pyro_adaann.sampling.metric import Metric
from pyro_adaann.sampling.moves import SMALL_STEPS, Move, draw_base, independence_move
from pyro_adaann.sampling.target import Points, TemperedTarget
from pyro_adaann.weights import resample

__all__ = ["GuidedChains", "Transition"]

#: Draws of the guide from which the walkers are resampled by their weights, at least.
_NUM_START_DRAWS = 2000
#: Proposals from the guide before every move. They are one batch, so many cost little more than one.
_NUM_PROPOSALS = 16
#: The `move_index` of moves in turn: chains that are stuck in a narrow place need small steps.
_MOVES = (0, SMALL_STEPS)


@dataclass(frozen=True)
class Transition:
    """One step of all chains.

    :param points: where they are after it.
    :param acceptance: acceptance probabilities of the move, shape ``(chains,)``.
    :param guide_acceptance: of the proposals from the guide, likewise.
    :param is_tuned: whether the move had the tuned step size.
    """

    points: Points
    acceptance: Tensor
    guide_acceptance: Tensor
    is_tuned: bool


class GuidedChains:
    """Chains at inverse temperature 1 in the coordinates of a guide; tuned by walkers, then fixed.

    :param svi: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``.
    :param args: arguments of model and guide.
    :param kwargs: keyword arguments of model and guide.
    :param kernel: the move that alternates with proposals from the guide.
    :param vectorize: whether the model runs once for all chains.
    :param seed: of all random numbers.
    """

    def __init__(
        self,
        svi: Fit,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        kernel: Move,
        vectorize: bool,
        seed: int,
    ) -> None:
        model, guide = get_model_and_guide(svi)
        self.model = UnconstrainedModel(model, args, kwargs, vectorize=vectorize)
        flow = guide_flow(guide, self.model, args, kwargs)
        self.target = TemperedTarget(self.model, JOINT, "guide", flow)
        self.kernel = kernel
        self.generator: Generator = torch.Generator("cpu").manual_seed(seed)
        self.step_size = kernel.initial_step_size(self.model.dim)
        self._num_steps = 0
        self.metric = Metric(torch.ones_like(self.model.example).unsqueeze(0))

    def start(self, num_walkers: int) -> Points:
        """Return draws of the guide, resampled by their importance weights.

        :raises ValueError: if no draw has a finite log density.
        """
        assert self.target.flow is not None
        num_draws = max(_NUM_START_DRAWS, 10 * num_walkers)
        x = draw_base(self.target.flow.proposal, num_draws, self.generator).to(self.model.example)
        points = self.target.evaluate(x)
        log_weights = self.target.log_density(points.terms, 1.0) - self.target.proposal_log_prob(x)
        log_weights = torch.where(torch.isfinite(log_weights), log_weights, -torch.inf)
        num_positive = int((log_weights > -torch.inf).sum())
        if not num_positive:
            raise ValueError(
                f"Expected draws of the guide at which the model has a finite log density; got none of "
                f"{num_draws}. Fit the guide before its draws are polished."
            )
        seed = int(torch.randint(2**62, (), generator=self.generator, device="cpu"))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Different places rather than the one or two draws that unreliable weights rest on.
            index = resample(log_weights, num_walkers, replacement=num_positive < num_walkers)
        return points[index]

    def tune(self, points: Points, num_steps: int) -> Points:
        """Move walkers, and fit scales and step size to them; return where they end."""
        weights = points.x.new_ones(len(points.x))
        refits = {num_steps // 8, num_steps // 4, num_steps // 2}
        for step in range(num_steps):
            if step in refits and len(points.x) > 2:
                self.metric = Metric.of(points, weights, dense=True)
            transition = self.step(points)
            points = transition.points
            if not transition.is_tuned:
                continue
            # The gain falls after the last change of scales, so that the step size settles.
            gain = 1.0 / max(1.0, (step - num_steps // 2) / 10)
            excess = float(transition.acceptance.mean()) - self.kernel.target_acceptance
            self.step_size = float(min(max(self.step_size * 2.0 ** (gain * excess), 1e-6), 10.0))
        return points

    def step(self, points: Points) -> Transition:
        """Propose from the guide, then move: in turn by steps of the tuned size and by small ones."""
        points, guided = independence_move(self.target, 1.0, points, self.generator, _NUM_PROPOSALS)
        self._num_steps += 1
        index = _MOVES[self._num_steps % len(_MOVES)]
        points, moved = self.kernel(
            self.target, 1.0, points, self.metric, self.step_size, self.generator, index
        )
        return Transition(points, moved, guided, self.kernel.adapts_at(index))
