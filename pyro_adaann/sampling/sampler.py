"""One stage after the other of sequential Monte Carlo: temperature, weights, resampling, moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_adaann.annealing.schedules import AnnealingSchedule
from pyro_adaann.sampling.forgetting import correlation, have_forgotten, shift
from pyro_adaann.sampling.metric import Metric
from pyro_adaann.sampling.moves import Move, draw_base, independence_move
from pyro_adaann.sampling.particles import Particles, combine_evidences
from pyro_adaann.sampling.result import SMCResult, SMCStage
from pyro_adaann.sampling.target import Points, TemperedTarget
from pyro_adaann.sampling.temperatures import first_inverse_temperature, next_inverse_temperature
from pyro_adaann.weights import effective_sample_size

__all__ = ["Sampler", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What does not change in a run; see :class:`AnnealedSMC` for each."""

    schedule: AnnealingSchedule
    kernel: Move
    num_particles: int
    num_groups: int
    dense_mass: bool
    num_moves: int | None
    max_moves: int
    max_correlation: float
    resample_below: float
    tuning: tuple[SMCStage, ...] | None


class Sampler:
    """The particles of a run, and one turn of its loop.

    :param target: the tempered densities.
    :param settings: of the run.
    :param seed: of all random numbers.
    """

    def __init__(self, target: TemperedTarget, settings: Settings, seed: int) -> None:
        self.target, self.settings, self.seed = target, settings, seed
        _check_tuning(settings.tuning, target.model.dim)
        self.stages: list[SMCStage] = []
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.particles: Particles | None = None
        #: Of the next move, in units of the metric.
        self.step_size = settings.kernel.initial_step_size(target.model.dim)

    @property
    def inverse_temperature(self) -> float:
        """The inverse temperature of the last stage, 0 before the first."""
        return self.stages[-1].inverse_temperature if self.stages else 0.0

    @property
    def is_done(self) -> bool:
        """Whether the last inverse temperature has been reached."""
        tuning = self.settings.tuning
        if tuning is not None:
            return len(self.stages) == len(tuning)
        return (
            bool(self.stages) and self.inverse_temperature >= self.settings.schedule.final_inverse_temperature
        )

    def step(self) -> SMCStage:
        """Go on to the next inverse temperature and return what has happened.

        :raises ValueError: if no particle has any weight left.
        """
        num_before = self.target.num_evaluations
        particles, t = self._start() if self.particles is None else self._next(self.particles)
        if not bool((particles.log_weights > -torch.inf).any()):
            raise ValueError(
                f"Expected at least one particle with a finite log density; got none of "
                f"{self.settings.num_particles} at inverse temperature {t:.3g}. Start closer to the "
                f"posterior (`base` with path='bridge'), or see whether the model runs on draws of its prior."
            )
        ess = effective_sample_size(particles.total_log_weights)
        particles, num_resampled = particles.resample(self.settings.resample_below, self.generator)
        moved = self._move(particles, t)
        self.particles = moved.particles
        stage = SMCStage(
            inverse_temperature=t,
            ess=ess,
            num_resampled=num_resampled,
            log_evidence=combine_evidences(particles.group_log_evidences)[0],
            metric=moved.metric,
            step_sizes=tuple(moved.step_sizes),
            acceptance=moved.acceptance,
            guide_acceptance=moved.guide_acceptance,
            correlation=moved.correlation,
            num_evaluations=self.target.num_evaluations - num_before,
            num_broken=particles.num_broken,
            has_forgotten=moved.has_forgotten,
            shift=moved.shift,
        )
        self.stages.append(stage)
        return stage

    # --- weights -------------------------------------------------------------------------------------

    def _start(self) -> tuple[Particles, float]:
        """Draw the particles and weigh them to the first tempered density."""
        target, settings = self.target, self.settings
        points = target.evaluate(self._draw_start())
        log_start = target.log_start(points.terms, target.base is not None)

        def log_weights_at(t: float) -> Tensor:
            return target.log_density(points.terms, t) - log_start

        if settings.tuning is not None:
            t = settings.tuning[0].inverse_temperature
        else:
            starts_exactly = (target.path.base == 1) == (target.base is not None)
            t = first_inverse_temperature(settings.schedule, log_weights_at, starts_exactly=starts_exactly)
        shape = settings.num_groups, settings.num_particles // settings.num_groups
        zeros = points.terms.new_zeros(shape, dtype=torch.float64)
        particles = Particles(points, zeros, zeros[:, 0])
        return particles.reweight(log_weights_at(t)), t

    def _draw_start(self) -> Tensor:
        target, num = self.target, self.settings.num_particles
        if isinstance(target.base, str):
            assert target.flow is not None
            return draw_base(target.flow.base, num, self.generator).to(target.model.example)
        if target.base is not None:
            z = draw_base(target.base, num, self.generator).to(target.model.example)
        else:
            seed = int(torch.randint(2**62, (), generator=self.generator, device="cpu"))
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                z = target.model.draw_prior(num)
        return z if target.flow is None else target.flow.inverse(z)

    def _next(self, particles: Particles) -> tuple[Particles, float]:
        """Choose the next inverse temperature and weigh the particles to it."""
        log_factor, t = self.target.log_factor(particles.points.terms), self.inverse_temperature
        if self.settings.tuning is not None:
            new = self.settings.tuning[len(self.stages)].inverse_temperature
        else:
            weights = particles.total_log_weights
            new = next_inverse_temperature(self.settings.schedule, t, log_factor, weights)
        return particles.reweight((new - t) * log_factor.double()), new

    # --- moves ---------------------------------------------------------------------------------------

    def _move(self, particles: Particles, t: float) -> _Moved:
        """Move the particles until they have forgotten where they were."""
        settings, target = self.settings, self.target
        tuned = None if settings.tuning is None else settings.tuning[len(self.stages)]
        weights = particles.total_log_weights.softmax(0)
        points = particles.points.without_gradient()
        if settings.kernel.uses_gradient:
            points = target.evaluate_with_gradient(points.x, t)
        metric = (
            tuned.metric
            if tuned
            else Metric.of_others(points, weights, settings.num_groups, dense=settings.dense_mass)
        )
        limit = settings.max_moves if settings.num_moves is None else settings.num_moves
        limit = tuned.num_moves if tuned else limit
        start = self._features(points)
        step_sizes: list[float] = []
        acceptances: list[float] = []
        guide_acceptances: list[float] = []
        correlations: list[tuple[float, float]] = []
        while len(step_sizes) < limit:
            step_size = tuned.step_sizes[len(step_sizes)] if tuned else self.step_size
            if target.flow is not None:
                points, probability = independence_move(target, t, points, self.generator)
                guide_acceptances.append(_mean(weights, probability))
            index = len(step_sizes)
            points, probability = settings.kernel(target, t, points, metric, step_size, self.generator, index)
            step_sizes.append(step_size)
            acceptances.append(_mean(weights, probability))
            if settings.kernel.adapts_at(index):
                self.step_size = self._adapt(step_size, acceptances[-1])
            correlations.append(correlation(start, self._features(points), weights))
            if (
                settings.num_moves is None
                and not tuned
                and have_forgotten(correlations, settings.max_correlation)
            ):
                break
        after = self._features(points)[:, 0]
        return _Moved(
            Particles(points, particles.log_weights, particles.log_evidences, particles.num_broken),
            metric,
            step_sizes,
            sum(acceptances) / max(len(acceptances), 1),
            sum(guide_acceptances) / len(guide_acceptances) if guide_acceptances else None,
            max(correlations[-1]) if correlations else 1.0,
            have_forgotten(correlations, settings.max_correlation),
            shift(start[:, 0], after, weights, settings.num_groups),
        )

    def _features(self, points: Points) -> Tensor:
        """Return what is to be forgotten, the log factor and the coordinates, shape ``(n, 1 + d)``."""
        log_factor = self.target.log_factor(points.terms).unsqueeze(-1)
        return torch.cat([log_factor, points.x], dim=-1).double()

    def _adapt(self, step_size: float, acceptance: float) -> float:
        excess = acceptance - self.settings.kernel.target_acceptance
        return float(min(max(step_size * 2.0**excess, 1e-6), 10.0))

    # --- what comes out ------------------------------------------------------------------------------

    def result(self) -> SMCResult:
        """Return the particles as they are."""
        assert self.particles is not None
        points = self.particles.points
        z = self.target.to_model(points.x)
        return SMCResult(
            samples=self.target.model.constrain(z),
            log_weights=self.particles.total_log_weights.log_softmax(0),
            log_p=points.terms[0] + points.terms[1],
            unconstrained=z,
            group_log_evidences=self.particles.group_log_evidences,
            stages=tuple(self.stages),
            seed=self.seed,
        )


@dataclass(frozen=True)
class _Moved:
    particles: Particles
    metric: Metric
    step_sizes: list[float]
    acceptance: float
    guide_acceptance: float | None
    correlation: float
    has_forgotten: bool
    shift: tuple[float, float]


def _check_tuning(tuning: tuple[SMCStage, ...] | None, dim: int) -> None:
    if tuning is not None and tuning[0].metric.factor.shape[-1] != dim:
        raise ValueError(
            f"Expected `tuning` of a run on the same model, with {dim} latent variables; got one with "
            f"{tuning[0].metric.factor.shape[-1]}. Run a pilot on this model."
        )


def _mean(weights: Tensor, values: Tensor) -> float:
    kept = weights > 0
    return float(weights[kept] @ values[kept].double())
