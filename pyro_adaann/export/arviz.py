"""Export of a fitted guide to ArviZ: `InferenceData` for ArviZ 0.x, `DataTree` for 1.x."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyro
import torch

from pyro_adaann.annealing.history import AnnealingHistory
from pyro_adaann.diagnostics.diagnose import get_inverse_temperature
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.lost_parts import find_lost_parts
from pyro_adaann.diagnostics.model_and_guide import Fit
from pyro_adaann.export.arviz_groups import (
    Groups,
    collect_posterior,
    collect_prior,
    observed_data,
    site_dims,
)
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.version import __version__
from pyro_adaann.weights import pareto_smooth, resample

__all__ = ["to_arviz"]


def to_arviz(
    svi: Fit,
    *args: Any,
    num_samples: int = 4000,
    batch_size: int = 1000,
    vectorize: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    posterior_predictive: bool = True,
    log_likelihood: bool = True,
    prior: bool = False,
    weighted: bool = False,
    sample_dims: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Draw from a fitted guide, as data for ArviZ.

    Latent variables and `pyro.deterministic` sites have the model's own names and shapes, and the
    names of their plates as dimensions. Discrete sites that the model sums out are left out, and
    deterministic sites that depend on them. The log likelihood is one number per observation.

    :param svi: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: number of draws.
    :param batch_size: how many at a time.
    :param vectorize: whether model and guide run for a batch at once; slower, but safe, without.
    :param coords: labels of dimensions, plates included.
    :param dims: for a site the names of those of its dimensions that belong to no plate, or of all.
    :param constant_data: arrays for the group of that name.
    :param posterior_predictive: whether to draw new data for every draw.
    :param log_likelihood: whether to compute it.
    :param prior: whether to draw from the prior too, with new data.
    :param weighted: whether to resample the draws by their importance weights, as a diagnosis "usable
        with weights" asks for. Then there are no weights in ``sample_stats``: each is the same.
    :param sample_dims: dimensions of the draws. ``["sample"]``, by default with ArviZ 1.x, says that
        they are independent; ``["chain", "draw"]``, always with ArviZ 0.x, makes them one chain, which
        the leave-one-out functions of ArviZ need in any version.
    :return: ``arviz.InferenceData`` if ArviZ before version 1 is installed, else ``xarray.DataTree``.
        Besides the usual groups it has ``annealing``, the stages of the fit; its attributes say the
        settings, the inverse temperature and the Pareto k-hat of the draws.
    :raises ValueError: if ``dims`` or ``sample_dims`` do not fit, if a plate is subsampled, if the guide
        misses a latent site, if the model does not vectorize, or if observations have no log likelihood
        each.
    :raises ImportError: if there is no ArviZ.

    Warns if annealing has not reached inverse temperature 1: the draws then are of a tempered posterior.

    Example::

        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("days", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> data = to_arviz((model, AutoNormal(model)), torch.zeros(3), num_samples=100)
        >>> data["observed_data"]["x"].dims
        ('days',)
    """
    sample_dims = _get_sample_dims(sample_dims)
    attrs = _attributes(svi)
    if attrs["inverse_temperature"] < 1:
        warnings.warn(
            f"The fit stands at inverse temperature {attrs['inverse_temperature']:.3g}: the draws are "
            f"of a tempered posterior, not of the posterior. Anneal to 1, for example with svi.run().",
            stacklevel=2,
        )
    if isinstance(svi, AdaAnnSVI) and svi.ladder is not None and svi.ladder.rungs:
        report = find_lost_parts(svi, *args, vectorize=vectorize, **kwargs)
        attrs["num_lost_parts"], attrs["lost_share"] = len(report.lost), report.lost_share
        if report.lost:
            warnings.warn(f"{report} The draws lack it.", stacklevel=2)
    draws = GuideDraws(svi, args, kwargs, vectorize=vectorize)
    groups = collect_posterior(
        draws,
        num_samples,
        batch_size,
        posterior_predictive=posterior_predictive,
        log_likelihood=log_likelihood,
    )
    log_weights, attrs["pareto_k_hat"] = pareto_smooth(groups["sample_stats"]["log_weight"])
    attrs["weighted"] = int(weighted)
    if weighted:
        index = resample(log_weights, num_samples)
        del groups["sample_stats"]
        groups = {
            group: {name: value[index] for name, value in part.items()} for group, part in groups.items()
        }
    if prior:
        groups.update(collect_prior(draws, num_samples, batch_size))
    fixed = {"observed_data": observed_data(draws), "constant_data": dict(constant_data or {})}
    names = dict.fromkeys(
        name
        for group, part in {**groups, **fixed}.items()
        if group not in ("sample_stats", "constant_data")
        for name in part
    )
    all_dims = {**(dims or {}), **site_dims(draws.prototype, list(names), dims or {})}
    data = _convert(groups, fixed, {"coords": dict(coords or {}), "dims": all_dims}, sample_dims, attrs)
    if isinstance(svi, AdaAnnSVI):
        _add_history(data, svi.history)
    return data


def _attributes(svi: Fit) -> dict[str, Any]:
    """Return the settings of a fit, as the numbers and strings that NetCDF can hold."""
    guide = svi[1] if isinstance(svi, tuple) else svi.guide
    attrs: dict[str, Any] = {
        "inference_library": "pyro_adaann",
        "inference_library_version": __version__,
        "pyro_version": pyro.__version__,
        "guide": getattr(guide, "__name__", type(guide).__name__),
        "inverse_temperature": get_inverse_temperature(svi),
    }
    if hasattr(guide, "num_transforms"):
        attrs["num_transforms"] = guide.num_transforms
    if isinstance(svi, AdaAnnSVI):
        attrs["is_done"] = int(svi.is_done)
        attrs["path"] = svi.path.name
        attrs["schedule"] = repr(svi.schedule)
        if svi.stage_rule is not None:
            attrs["stage_rule"] = repr(svi.stage_rule)
            attrs["num_untracked_stages"] = len(svi.history.untracked)
        for name in ("num_initial_steps", "num_steps_per_stage", "num_final_steps"):
            attrs[name] = getattr(svi, name)
    return attrs


def _get_sample_dims(sample_dims: Sequence[str] | None) -> list[str]:
    known = [["chain", "draw"]] if _has_old_arviz() else [["sample"], ["chain", "draw"]]
    if sample_dims is None:
        return known[0]
    if list(sample_dims) not in known:
        raise ValueError(
            f"Expected `sample_dims` to be {' or '.join(map(str, known))} with the ArviZ installed here; "
            f"got {list(sample_dims)}."
        )
    return list(sample_dims)


def _convert(
    groups: Groups,
    fixed: dict[str, dict[str, Any]],
    labels: dict[str, Any],
    sample_dims: list[str],
    attrs: dict[str, Any],
) -> Any:
    """Hand the groups to the ArviZ that is installed."""
    data: dict[str, Any] = {group: _to_numpy(part) for group, part in groups.items()}
    if len(sample_dims) == 2:
        data = {group: {name: value[None] for name, value in part.items()} for group, part in data.items()}
    data |= {group: _to_numpy(part) for group, part in fixed.items() if part}
    if _has_old_arviz():
        import arviz

        return arviz.from_dict(**data, **labels, attrs=attrs)
    try:
        from arviz_base import from_dict
    except ImportError as error:
        raise ImportError("Expected ArviZ to be installed; got none. Run `pip install arviz`.") from error
    return from_dict(data, **labels, sample_dims=sample_dims, attrs={"/": attrs})


def _has_old_arviz() -> bool:
    try:
        return int(version("arviz").split(".")[0]) < 1
    except PackageNotFoundError:
        return False


def _to_numpy(part: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)
        for name, value in part.items()
    }


def _add_history(data: Any, history: AnnealingHistory) -> None:
    """Add the stages of a fit as group ``annealing``, with the loss of every step."""
    import xarray

    stages = history.stages
    fields = {
        name: [np.nan if value is None else value for value in (getattr(s, name) for s in stages)]
        for name in (
            "inverse_temperature",
            "num_steps",
            "num_rejected",
            "broken_share",
            "log_factor_mean",
            "log_factor_sd",
            "log_normalizer",
            "ess",
        )
    }
    dataset = xarray.Dataset(
        {name: ("stage", np.asarray(values)) for name, values in fields.items()},
        coords={"stage": np.arange(len(stages)), "step": np.arange(history.num_steps)},
    )
    dataset["loss"] = "step", np.asarray(history.losses, dtype=float)
    if _has_old_arviz():
        data.add_groups({"annealing": dataset})
    else:
        data["annealing"] = xarray.DataTree(dataset)
