"""From a fit to chains that are exact in the limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.ops import stats
from torch import Tensor
from torch.distributions import biject_to

from pyro_adaann.checks import check_count
from pyro_adaann.diagnostics.model_and_guide import Fit
from pyro_adaann.sampling.arviz import draws_to_arviz
from pyro_adaann.sampling.chains import GuidedChains, Transition
from pyro_adaann.sampling.convergence import rank_normalized_r_hat
from pyro_adaann.sampling.moves import Move, get_kernel
from pyro_adaann.sampling.target import Points
from pyro_adaann.state.counter import Counter
from pyro_adaann.state.interrupt import InterruptGuard

__all__ = ["GuideKernel", "PolishedChains", "polish"]


@dataclass(frozen=True)
class PolishedChains:
    """Chains of the posterior, from :func:`polish`.

    :param samples: for every latent site its draws, shape ``(chains, draws) + shape of the site``.
    :param log_p: log joint density in unconstrained coordinates, shape ``(chains, draws)``.
    :param acceptance: acceptance probabilities of the moves, likewise.
    :param guide_acceptance: of the proposals from the guide, likewise: near 1 where the guide is the
        posterior.
    :param step_size: of the moves, in units of the walkers' sds.
    :param num_evaluations: evaluations of the model, one for each chain and gradient.
    :param seed: of the run.

    Example::

        >>> chains = PolishedChains(
        ...     {"z": torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))},
        ...     *[torch.ones(4, 1000)] * 3, step_size=0.5, num_evaluations=10_000, seed=0)
        >>> chains.max_r_hat < 1.01
        True
    """

    samples: dict[str, Tensor]
    log_p: Tensor
    acceptance: Tensor
    guide_acceptance: Tensor
    step_size: float
    num_evaluations: int
    seed: int

    @property
    def r_hat(self) -> dict[str, Tensor]:
        """Rank-normalized split R-hat of every site, element by element; NaN with fewer than four draws."""
        return {name: rank_normalized_r_hat(value) for name, value in self.samples.items()}

    @property
    def ess(self) -> dict[str, Tensor]:
        """Effective number of independent draws of every site, element by element."""
        return {
            name: stats.effective_sample_size(value.double(), chain_dim=0, sample_dim=1)
            for name, value in self.samples.items()
        }

    @property
    def max_r_hat(self) -> float:
        """The largest R-hat; below 1.01 the chains agree."""
        return max(float(value.max()) for value in self.r_hat.values())

    @property
    def min_ess(self) -> float:
        """The smallest effective number of draws."""
        return min(float(value.min()) for value in self.ess.values())

    def to_arviz(self, **labels: Any) -> Any:
        """Return the chains as data for ArviZ.

        :param labels: ``coords`` and ``dims``, as ArviZ's ``from_dict`` takes them.
        :return: ``arviz.InferenceData`` if ArviZ before version 1 is installed, else ``xarray.DataTree``.
        """
        sample_stats = {
            "lp": self.log_p,
            "acceptance_rate": self.acceptance,
            "guide_acceptance_rate": self.guide_acceptance,
        }
        attrs = {"step_size": self.step_size, "num_evaluations": self.num_evaluations, "seed": self.seed}
        return draws_to_arviz(self.samples, sample_stats, attrs, **labels)

    def __repr__(self) -> str:
        num_chains, num_samples = self.log_p.shape
        agree = "agree" if self.max_r_hat < 1.01 else "do not agree yet (draw more, or fit the guide better)"
        return (
            f"PolishedChains: {num_chains} chains of {num_samples} draws, {self.num_evaluations:,} "
            f"evaluations\n  R-hat at most {self.max_r_hat:.3f}: the chains {agree}; effectively at least "
            f"{self.min_ess:.0f} draws\n"
            f"  accepted: {float(self.acceptance.mean()):.0%} of the moves, "
            f"{float(self.guide_acceptance.mean()):.0%} of the guide's proposals"
        )


def polish(
    svi: Fit,
    *args: Any,
    num_chains: int = 4,
    num_samples: int = 1000,
    num_warmup: int = 200,
    num_walkers: int = 64,
    kernel: str | Move = "hmc",
    vectorize: bool = True,
    progress_bar: bool = True,
    seed: int | None = None,
    **kwargs: Any,
) -> PolishedChains:
    r"""Run chains of the posterior from a fit: proposals from the guide, and moves in its coordinates.

    In the coordinates x of the guide's flow, z = T(x), the posterior is
    :math:`p(T(x)) |\det J_T(x)|`: close to the base where the fit is good, so that Hamiltonian Monte Carlo
    is easy, and a proposal from the guide is often accepted and may go to another mode. Every step makes
    sixteen proposals to each chain, in one batch, and one move. Both
    leave the posterior invariant whatever the guide is; a part of the posterior that the guide misses is
    still entered by the moves alone, if at all.

    Walkers, draws of the guide resampled by their weights, tune scales and step size together; then both
    are fixed and the chains start from some of them. Ctrl-C ends the chains early, with the draws so far.

    :param svi: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``; the guide has a base and a
        transform.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_chains: number of chains.
    :param num_samples: number of draws of each.
    :param num_warmup: number of steps of the walkers.
    :param num_walkers: number of walkers, at least ``num_chains``.
    :param kernel: "hmc", "random_walk" for models without gradients, or one of
        `pyro_adaann.sampling.moves` with settings.
    :param vectorize: whether the model runs once for all chains; slower, but safe, without.
    :param progress_bar: whether to show one.
    :param seed: of all random numbers; by default one is drawn from torch's generator.
    :raises ValueError: if an argument is out of range, if the guide has no transform, if no draw of it has a
        finite log density, or if the model does not vectorize.

    Source: Gabrié, Rotskoff and Vanden-Eijnden, *Adaptive Monte Carlo augmented with normalizing flows*,
    PNAS 119 (2022); Hoffman et al., *NeuTra-lizing bad geometry*, arXiv 1903.03704.

    Example::

        >>> import pyro.distributions as dist, pyro
        >>> from pyro_adaann import AutoPlanar
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))
        >>> chains = polish((model, AutoPlanar(model, 2)), num_samples=100, num_warmup=20,
        ...                 seed=0, progress_bar=False)
        >>> abs(float(chains.samples["z"][..., 0].mean()) - 1 / 3) < 0.15
        True
    """
    check_count("num_chains", num_chains, 1)
    check_count("num_samples", num_samples, 1)
    check_count("num_warmup", num_warmup, 0)
    check_count("num_walkers", num_walkers, num_chains)
    seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
    chains = GuidedChains(svi, args, kwargs, kernel=get_kernel(kernel), vectorize=vectorize, seed=seed)
    points = chains.tune(chains.start(num_walkers), num_warmup)
    points = points[torch.arange(num_chains, device=points.x.device)]
    transitions: list[Transition] = []
    progress = Counter("draw", progress_bar, total=num_samples)
    with InterruptGuard() as interrupt, progress:
        while len(transitions) < num_samples and not (interrupt.requested and transitions):
            transitions.append(chains.step(points))
            points = transitions[-1].points
            progress.update()
    flat = torch.stack([each.points.x for each in transitions], dim=1).reshape(-1, chains.model.dim)
    samples = chains.model.constrain(chains.target.to_model(flat))
    return PolishedChains(
        samples={name: v.reshape(num_chains, -1, *v.shape[1:]) for name, v in samples.items()},
        log_p=torch.stack([each.points.terms[:2].sum(0) for each in transitions], dim=1),
        acceptance=torch.stack([each.acceptance for each in transitions], dim=1),
        guide_acceptance=torch.stack([each.guide_acceptance for each in transitions], dim=1),
        step_size=chains.step_size,
        num_evaluations=chains.target.num_evaluations,
        seed=seed,
    )


class GuideKernel(MCMCKernel):
    """The chains of :func:`polish` as a kernel of `pyro.infer.MCMC`.

    Walkers tune it when it is set up, so that ``warmup_steps`` of `MCMC` are only steps that are thrown
    away. Chains in several processes need a model and a guide that can be pickled, as with Pyro's kernels.

    :param svi: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``.
    :param num_tuning_steps: number of steps of the walkers.
    :param num_walkers: number of walkers.
    :param kernel: "hmc", "random_walk", or one of `pyro_adaann.sampling.moves` with settings.
    :raises ValueError: at set-up, as :func:`polish` does.

    Example::

        >>> import pyro.distributions as dist, pyro
        >>> from pyro.infer import MCMC
        >>> from pyro_adaann import AutoPlanar
        >>> def model():
        ...     return pyro.sample("z", dist.Gamma(2.0, 1.0))
        >>> kernel = GuideKernel((model, AutoPlanar(model, 2)), num_tuning_steps=20)
        >>> mcmc = MCMC(kernel, num_samples=20, warmup_steps=5, disable_progbar=True)
        >>> mcmc.run()
        >>> bool((mcmc.get_samples()["z"] > 0).all())
        True
    """

    def __init__(
        self,
        svi: Fit,
        *,
        num_tuning_steps: int = 200,
        num_walkers: int = 64,
        kernel: str | Move = "hmc",
    ) -> None:
        check_count("num_tuning_steps", num_tuning_steps, 0)
        check_count("num_walkers", num_walkers, 1)
        self.svi, self.num_tuning_steps, self.num_walkers = svi, num_tuning_steps, num_walkers
        self.kernel = get_kernel(kernel)
        #: What `MCMC` maps the draws back with.
        self.transforms: dict[str, Any] | None = None
        self._chains: GuidedChains | None = None
        self._acceptances: list[tuple[float, float]] = []

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Tune scales and step size on walkers, and choose where the chain starts."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        chains = GuidedChains(self.svi, args, kwargs, kernel=self.kernel, vectorize=True, seed=seed)
        points = chains.tune(chains.start(self.num_walkers), self.num_tuning_steps)
        self._chains, self._acceptances = chains, []
        self._move_to(points[torch.zeros(1, dtype=torch.long, device=points.x.device)])
        self.transforms = {name: biject_to(s["fn"].support).inv for name, s in chains.model.sites.items()}

    def _move_to(self, points: Points) -> None:
        assert self._chains is not None
        self._points = points
        self._params = self._chains.model.split(self._chains.target.to_model(points.x)[0])

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Unconstrained values of the sites where the chain starts."""
        return self._params

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        raise ValueError(
            "Expected no `initial_params`: the chain starts from a draw of the guide. Leave them out of MCMC."
        )

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the unconstrained values after one step from ``params``, those returned last."""
        assert self._chains is not None
        if params is not self._params:
            raise ValueError("Expected the values that the last step has returned; got others.")
        transition = self._chains.step(self._points)
        self._acceptances.append((float(transition.acceptance), float(transition.guide_acceptance)))
        self._move_to(transition.points)
        return self._params

    def logging(self) -> dict[str, str]:
        """Return what the progress bar of `MCMC` shows."""
        move, guide = torch.tensor(self._acceptances, device="cpu").mean(0).tolist()
        return {"acc. prob": f"{move:.3f}", "guide acc. prob": f"{guide:.3f}"}

    def diagnostics(self) -> dict[str, float]:
        """Return the mean acceptance probabilities."""
        move, guide = torch.tensor(self._acceptances, device="cpu").mean(0).tolist()
        return {"acceptance rate": move, "guide acceptance rate": guide}
