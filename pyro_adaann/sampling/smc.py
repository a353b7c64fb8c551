r"""Sequential Monte Carlo along an annealing path.

Particles :math:`z_i` with weights stand for the tempered density :math:`p_t`. From one inverse temperature
to the next their weights are multiplied by :math:`p_{t'} / p_t`; where few of them hold most of the
weight they are resampled; and they move by steps that leave :math:`p_{t'}` invariant until they have
forgotten where they were. At t = 1 they are weighted draws of the posterior, and the product of the mean
weights is the evidence. With ever more particles both are exact, whatever the moves are.

Sources: Neal, *Annealed importance sampling*, Stat. Comput. 11 (2001); Del Moral, Doucet and Jasra,
*Sequential Monte Carlo samplers*, JRSS B 68 (2006); Cobian et al., *AdaAnn*, arXiv 2202.00792.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path as FilePath
from typing import Any

import torch

from pyro_adaann.annealing.paths import Path, get_path
from pyro_adaann.annealing.schedules import AdaAnnSchedule, AnnealingSchedule
from pyro_adaann.checks import check_count
from pyro_adaann.sampling.density import UnconstrainedModel
from pyro_adaann.sampling.flow import guide_flow
from pyro_adaann.sampling.missing import without_missing
from pyro_adaann.sampling.moves import Move, get_kernel
from pyro_adaann.sampling.result import SMCResult, SMCStage
from pyro_adaann.sampling.resume import restore, state_of
from pyro_adaann.sampling.sampler import Sampler, Settings
from pyro_adaann.sampling.target import TemperedTarget
from pyro_adaann.state.checkpoint import CheckpointKeeper, read_checkpoint
from pyro_adaann.state.counter import Counter
from pyro_adaann.state.interrupt import InterruptGuard

__all__ = ["AnnealedSMC"]


class AnnealedSMC:
    r"""Sequential Monte Carlo on a Pyro model, annealed as `AdaAnnSVI` anneals a fit.

    Evidence and posterior are exact in the limit of many particles, so the result also judges a
    variational fit. The defaults start from the prior, choose inverse temperatures by the rule of AdaAnn
    (a tolerance of 0.32 keeps nine tenths of the particles effective from one to the next), and move
    by Hamiltonian Monte Carlo in the model's unconstrained coordinates.

    **The start.** Path "likelihood" starts from draws of the prior, which must be proper. "bridge" starts
    from ``base``, "joint" from draws of ``base`` weighted to the first tempered density; so does any path
    that is given one.

    **Bias.** Temperatures and moves that are tuned by the particles themselves leave a bias in the
    evidence that falls as one over their number. Pass ``tuning=pilot.stages``, the stages of another run, to
    have exactly unbiased evidence.

    :param model: a Pyro model whose latent variables are continuous or enumerated in the model.
    :param path: "likelihood", "joint", "bridge" or a :class:`Path`.
    :param guide: a fitted guide with a base and a transform, such as the flows of this package. Particles
        then move in its coordinates, and by proposals from it, so that modes exchange mass.
    :param base: a distribution of the unconstrained latent variables, of numbers (the same for each) or of
        vectors; "guide" for the fitted guide's density. By default the guide's base on path "bridge".
    :param schedule: an :class:`AdaAnnSchedule`, :class:`CESSSchedule` or fixed schedule.
    :param num_particles: number of particles.
    :param num_groups: of groups that never interact, which say how certain the evidence is.
    :param kernel: "hmc", "random_walk" for models without gradients, or one of
        `pyro_adaann.sampling.moves` with settings.
    :param dense_mass: whether moves are scaled by the covariance of the particles, or by their sds.
    :param num_moves: number of moves at every inverse temperature; None for as many as it takes until the
        correlation with the positions before is below ``max_correlation``.
    :param max_moves: the most of them.
    :param max_correlation: in (0, 1).
    :param resample_below: the effective share of a group's particles below which it is resampled.
    :param tuning: the stages of another run, of any number of particles and groups, whose temperatures,
        step sizes and numbers of moves are taken as they are, and the mean of its groups' scales; or None to
        tune by the particles.
    :param vectorize: whether the model runs once for all particles; slower, but safe, without.
    :param seed: of all random numbers; by default one is drawn from torch's generator.
    :raises ValueError: if an argument is out of range or does not go with the others.

    Sources: Neal (2001), Del Moral, Doucet and Jasra (2006), Cobian et al. (2022).

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 2.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> smc = AnnealedSMC(model, num_particles=512, seed=1)
        >>> result = smc.run(torch.tensor([1.0, 2.0]), progress_bar=False)
        >>> result.is_done, result.samples["z"].shape
        (True, torch.Size([512]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        path: str | Path = "likelihood",
        guide: Any = None,
        base: Any = None,
        schedule: AnnealingSchedule | None = None,
        num_particles: int = 1024,
        num_groups: int = 16,
        kernel: str | Move = "hmc",
        dense_mass: bool = True,
        num_moves: int | None = None,
        max_moves: int = 20,
        max_correlation: float = 0.3,
        resample_below: float = 0.5,
        tuning: Sequence[SMCStage] | None = None,
        vectorize: bool = True,
        seed: int | None = None,
    ) -> None:
        self.model, self.guide, self.base, self.seed = model, guide, base, seed
        self.path = get_path(path)
        self.vectorize = vectorize
        check_count("num_groups", num_groups, 1)
        check_count("num_particles", num_particles, 2 * num_groups)
        check_count("num_moves", num_moves, 0)
        check_count("max_moves", max_moves, 1)
        if num_particles % num_groups:
            raise ValueError(
                f"Expected `num_particles` to be a multiple of `num_groups`; got {num_particles} and "
                f"{num_groups}. Take {num_particles - num_particles % num_groups} particles."
            )
        for name, value in (("max_correlation", max_correlation), ("resample_below", resample_below)):
            if not 0 < value < 1:
                raise ValueError(f"Expected `{name}` in (0, 1); got {value}.")
        _check_start(self.path, guide, base)
        self.settings = Settings(
            schedule=AdaAnnSchedule(0.32) if schedule is None else schedule,
            kernel=get_kernel(kernel),
            num_particles=num_particles,
            num_groups=num_groups,
            dense_mass=dense_mass,
            num_moves=num_moves,
            max_moves=max_moves,
            max_correlation=max_correlation,
            resample_below=resample_below,
            tuning=None if tuning is None else _of_pilot(tuning),
        )

    def run(
        self,
        *args: Any,
        progress_bar: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | timedelta = timedelta(minutes=1),
        **kwargs: Any,
    ) -> SMCResult:
        """Anneal the particles to inverse temperature 1 and return them.

        Ctrl-C ends the run after the present stage, with a warning; the result then is that of a tempered
        posterior.

        :param args: arguments of the model, as ``kwargs``.
        :param progress_bar: whether to show inverse temperature, evidence and effective sample size.
        :param checkpoint: a file. If it exists the run goes on from it, bit for bit.
        :param checkpoint_every: how often to write it, in stages or as a `timedelta`. It is also written at
            the end.
        :raises ValueError: if the prior is improper where the path starts from it, if no particle has a
            finite log density, if a plate is subsampled, if the model does not vectorize, or if the
            checkpoint is another run's.
        """
        sampler = self._make_sampler(args, kwargs)
        if checkpoint is not None and FilePath(checkpoint).exists():
            restore(sampler, read_checkpoint(checkpoint))
        keeper = None
        if checkpoint is not None:
            keeper = CheckpointKeeper(checkpoint, checkpoint_every, lambda: state_of(sampler))
        progress = Counter("stage", progress_bar, initial=len(sampler.stages))
        with InterruptGuard() as interrupt, progress:
            try:
                while not (sampler.is_done or (interrupt.requested and sampler.stages)):
                    stage = sampler.step()
                    progress.update(stage.describe())
                    if keeper is not None:
                        keeper.step(len(sampler.stages))
            finally:
                if keeper is not None and sampler.stages:
                    keeper.write(len(sampler.stages))
        if not sampler.is_done:
            warnings.warn(
                f"Stopped at inverse temperature {sampler.inverse_temperature:.3g} by Ctrl-C: the draws are "
                f"of a tempered posterior. With a `checkpoint`, run again to go on.",
                stacklevel=2,
            )
        return sampler.result()

    def _make_sampler(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sampler:
        seed = int(torch.randint(2**62, (), device="cpu")) if self.seed is None else self.seed
        # A guide draws what is missing, too.
        own = without_missing(self.model, args, kwargs) if self.guide is None else self.model
        model = UnconstrainedModel(own, args, kwargs, vectorize=self.vectorize)
        base = self.base
        flow = None
        if self.guide is not None:
            flow = guide_flow(self.guide, model, args, kwargs)
            if base is None and self.path.base:
                base = flow.first
        target = TemperedTarget(model, self.path, base, flow)
        return Sampler(target, self.settings, seed)


def _of_pilot(stages: Sequence[SMCStage]) -> tuple[SMCStage, ...]:
    """Return stages whose metric does not depend on groups."""
    if not stages:
        raise ValueError("Expected `tuning` to be the stages of another run; got none. Pass `pilot.stages`.")
    return tuple(replace(stage, metric=stage.metric.pooled()) for stage in stages)


def _check_start(path: Path, guide: Any, base: Any) -> None:
    if path.entropy != 1:
        raise ValueError(
            f"Expected a path of tempered densities; got {path.name!r}, which starts from no density that "
            f"particles could have. Use 'likelihood' or 'bridge'."
        )
    if isinstance(base, str) and base != "guide":
        raise ValueError(f'Expected `base` to be a distribution or "guide"; got {base!r}.')
    if isinstance(base, str) and guide is None:
        raise ValueError('Expected a fitted guide with base="guide"; got none. Pass `guide`.')
    has_base = base is not None or (path.base and guide is not None)
    if not has_base and (path.base or path.prior != 1 or path.likelihood != 0):
        raise ValueError(
            f"Expected `base`, the density that path {path.name!r} starts from; got none. Pass a "
            f"distribution that covers the posterior in unconstrained coordinates, such as "
            f"base=dist.Normal(0.0, 3.0), or a guide."
        )
