r"""Simulation-based calibration: is a way of fitting right on data that the model itself has made?

Draw latent variables :math:`\theta_n` from the prior and data from the model at them, fit, and see where
:math:`\theta_n` is among the draws of the fitted posterior. If these are draws of the posterior its rank is
uniform, whatever model and data are. Ranks that pile up at both ends say that fits are too narrow, in the
middle too wide, at one end biased.

Source: Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
arXiv 1804.06788.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_adaann.checks import check_count
from pyro_adaann.objectives.observed import DrawObserved
from pyro_adaann.objectives.traces import sites_of
from pyro_adaann.sampling.verdict import Verdict, judge_ranks
from pyro_adaann.state.checkpoint import read_checkpoint, write_checkpoint
from pyro_adaann.state.counter import Counter

__all__ = ["Calibration", "simulation_based_calibration"]

#: Takes a model with simulated data, and its arguments; returns draws of equal weight by site, ``(n, ...)``.
FitFunction = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True)
class Calibration:
    """Ranks of the true values among the draws of the fits; printed, it says what is wrong, if anything.

    :param ranks: for every latent site numbers in (0, 1), shape ``(num_datasets,) + shape of the site``,
        uniform if the fits are right.

    Example::

        >>> generator = torch.Generator().manual_seed(0)
        >>> print(Calibration({"z": torch.rand(200, 2, generator=generator)}))
        No sign of a wrong posterior in 200 data sets.
        >>> narrow = dist.Normal(0.0, 1.0).cdf(1.6 * torch.randn(200, 2, generator=generator))
        >>> Calibration({"z": narrow}).is_calibrated
        False
    """

    ranks: dict[str, Tensor]

    @property
    def verdict(self) -> Verdict:
        """The tests of uniformity and what they say."""
        return judge_ranks(self.ranks)

    @property
    def is_calibrated(self) -> bool:
        """Whether there is no sign, at one in a hundred, that the fits are wrong."""
        return not self.verdict.findings

    def plot(self, num_bins: int = 10) -> Any:
        """Return a figure with the histogram of ranks of every site, and a band of what is usual.

        :param num_bins: number of bars.
        """
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(
            1, len(self.ranks), figsize=(3.5 * len(self.ranks), 2.6), squeeze=False, layout="constrained"
        )
        for axis, (name, ranks) in zip(axes[0], self.ranks.items(), strict=True):
            columns = ranks.reshape(len(ranks), -1)
            expected = len(ranks) / num_bins
            # Bars of one number have this sd; those of many dependent ones at most the same.
            spread = 2 * math.sqrt(expected * (1 - 1 / num_bins))
            counts = torch.histc(columns, num_bins, 0.0, 1.0) / columns.shape[1]
            axis.axhspan(max(expected - spread, 0), expected + spread, color="0.85")
            axis.bar([(i + 0.5) / num_bins for i in range(num_bins)], counts.tolist(), 0.9 / num_bins)
            axis.set(title=name, xlabel="rank of the truth", ylabel="data sets", xlim=(0, 1))
        return figure

    def __str__(self) -> str:
        return str(self.verdict)


def simulation_based_calibration(
    model: Callable[..., Any],
    fit: FitFunction,
    *args: Any,
    num_datasets: int = 100,
    num_processes: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    progress_bar: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> Calibration:
    """Fit data that the model has made, many times, and see whether the truth is where it should be.

    :param model: a Pyro model; its observed sites are drawn, so its data serve for their shapes alone.
    :param fit: called as ``fit(model, *args, **kwargs)`` with a model that observes simulated data instead
        of its own; returns draws of equal weight, nearly independent, for every latent site along a first
        dimension. Parameter store and seed are its own each time.
    :param args: arguments of the model, as ``kwargs``.
    :param num_datasets: number of data sets.
    :param num_processes: number of processes; with more than one, model and fit are defined at the top
        level of a module.
    :param checkpoint: a file with the ranks so far; if it exists they are not computed again.
    :param progress_bar: whether to show one.
    :param seed: of the data sets and the fits.
    :raises ValueError: if the model has a factor, which cannot be simulated, or a prior without density, if
        the fit returns no draws of a site, or if the checkpoint is of another run.

    Example::

        >>> from pyro_adaann import AnnealedSMC
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def fit(model, x):
        ...     smc = AnnealedSMC(model, num_particles=64, num_groups=4)
        ...     return smc.run(x, progress_bar=False).resample(50)
        >>> calibration = simulation_based_calibration(
        ...     model, fit, torch.zeros(3), num_datasets=10, progress_bar=False)
        >>> calibration.ranks["z"].shape
        torch.Size([10])
    """
    check_count("num_datasets", num_datasets, 1)
    check_count("num_processes", num_processes, 1)
    _check_model(model, args, kwargs)
    found: list[dict[str, Tensor]] = []
    if checkpoint is not None and Path(checkpoint).exists():
        state = read_checkpoint(checkpoint)
        if state.get("kind") != "calibration" or state.get("seed") != seed:
            raise ValueError(
                f"Expected a checkpoint of a calibration with seed {seed}; got one of "
                f"{state.get('kind', 'another kind')} with seed {state.get('seed')}. Give another path."
            )
        found = state["ranks"][:num_datasets]
    jobs = [(model, fit, args, kwargs, seed, index) for index in range(len(found), num_datasets)]
    with Counter("data set", progress_bar, total=num_datasets, initial=len(found)) as progress:
        for ranks in _results(jobs, num_processes):
            found.append(ranks)
            if checkpoint is not None:
                write_checkpoint(checkpoint, {"kind": "calibration", "seed": seed, "ranks": found})
            progress.update()
    return Calibration({name: torch.stack([ranks[name] for ranks in found]) for name in found[0]})


def _results(jobs: list[Any], num_processes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the ranks of data sets in order."""
    if num_processes == 1:
        yield from map(_rank_one, jobs)
        return
    # Fresh interpreters: forked ones may hang in torch's threads.
    with ProcessPoolExecutor(
        num_processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(_rank_one, jobs)


def _rank_one(job: Any) -> dict[str, Tensor]:
    """Simulate data, fit, and return the rank of every latent number."""
    model, fit, args, kwargs, seed, index = job
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(seed * 1_000_003 + index)
        with torch.no_grad():
            trace = poutine.trace(DrawObserved()(model)).get_trace(*args, **kwargs)
        data = {s["name"]: s["value"] for s in sites_of(trace) if s["infer"].get("was_observed")}
        truth = {name: trace.nodes[name]["value"] for name in _latent_names(trace)}
        draws = fit(_Replace(data)(model), *args, **kwargs)
        missing = [name for name in truth if name not in draws]
        if missing:
            raise ValueError(
                f"Expected draws of every latent site from `fit`; got none of {', '.join(missing)}."
            )
        return {name: _rank(value, draws[name].detach()) for name, value in truth.items()}


def _rank(truth: Tensor, draws: Tensor) -> Tensor:
    """Return where the truth is among n draws, spread evenly over its n-th part of (0, 1)."""
    below = (draws < truth).sum(0)
    ties = (draws == truth).sum(0)
    return (below + torch.rand(truth.shape, device=truth.device) * (ties + 1)) / (len(draws) + 1)


class _Replace(Messenger):
    """Observe other data."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        super().__init__()
        self.data = data

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.data:
            msg["value"] = self.data[msg["name"]]


def _latent_names(trace: poutine.Trace) -> list[str]:
    return [
        site["name"]
        for site in sites_of(trace)
        if not (
            site["is_observed"]
            or site["infer"].get("was_observed")
            or site["infer"].get("_deterministic")
            or poutine.util.site_is_subsample(site)
            or site["fn"].support.is_discrete
        )
    ]


def _check_model(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with torch.no_grad(), torch.random.fork_rng(), pyro.get_param_store().scope():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    for site in sites_of(trace):
        if isinstance(site["fn"], dist.Unit):
            raise ValueError(
                f"Expected a model whose data can be drawn; got the factor {site['name']!r}. Write it as an "
                f"observed distribution."
            )
        if isinstance(site["fn"], dist.MaskedDistribution) and not site["is_observed"]:
            raise ValueError(
                f"Expected a proper prior, which the truth is drawn from; got a mask on {site['name']!r}. "
                f"Give it a prior."
            )
