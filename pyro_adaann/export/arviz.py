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
from pyro_adaann.diagnostics.diagnose import assess
from pyro_adaann.diagnostics.guide_draws import GuideDraws
from pyro_adaann.diagnostics.model_and_guide import Fit, get_inverse_temperature
from pyro_adaann.diagnostics.numbers import rounded
from pyro_adaann.diagnostics.rules import Level
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.export.arviz_groups import (
    Groups,
    collect_posterior,
    collect_prior,
    observed_data,
    site_dims,
)
from pyro_adaann.objectives.one_by_one import is_one_by_one
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.version import __version__
from pyro_adaann.weights import pareto_smooth, resample

__all__ = ["to_arviz"]

#: Fields of every stage in the group ``annealing``.
_STAGE_FIELDS = (
    "inverse_temperature",
    "num_steps",
    "num_rejected",
    "broken_share",
    "log_factor_mean",
    "log_factor_sd",
    "log_normalizer",
    "ess",
)


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
    weighted: bool | None = None,
    diagnosis: Diagnosis | None = None,
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
    :param vectorize: whether model and guide run on a whole batch at once; False is slower and always works.
    :param coords: labels of dimensions, plates included.
    :param dims: for a site the names of those of its dimensions that belong to no plate, or of all.
    :param constant_data: arrays for the group of that name.
    :param posterior_predictive: whether to draw new data for every draw.
    :param log_likelihood: whether to compute it.
    :param prior: whether to draw from the prior too, with new data.
    :param weighted: whether to resample the draws by their importance weights. By default it is done where
        the verdict on the fit is "usable with weights", and the attribute ``weighted`` says so.
        ``sample_stats`` is then left out, since all weights are equal.
    :param diagnosis: what :func:`diagnose` has returned for this fit, so that nothing is measured twice.
    :param sample_dims: dimensions of the draws: ``["chain", "draw"]``, one chain, or with ArviZ 1.x
        ``["sample"]``, which says that they are independent.
    :return: ``arviz.InferenceData`` if ArviZ before version 1 is installed, else ``xarray.DataTree``.
        Besides the usual groups it has ``annealing``, the stages of the fit; its attributes hold the
        settings, the inverse temperature, the verdict and the Pareto k-hat of the draws.
    :raises ValueError: if ``dims`` or ``sample_dims`` do not fit, if a plate is subsampled, if the guide
        misses a latent site, if the model does not vectorize, or if observations have no log likelihood
        each.
    :raises ImportError: if there is no ArviZ.

    Warns if the draws do not represent the posterior, with or without weights, unless a ``diagnosis`` is
    given. Several fits become chains of one data set by ``arviz.concat(first, second, dim="chain",
    reset_dim=True)`` with ArviZ 0.x, and with 1.x by ``xarray.concat([first, second], "chain",
    data_vars="minimal", coords="minimal", compat="override", join="outer")``.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("days", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> pyro.clear_param_store()  # a new fit
        >>> guide = AutoNormal(model, init_scale=0.6)
        >>> data = to_arviz((model, guide), torch.zeros(3), num_samples=1000)
        >>> data["observed_data"]["x"].dims
        ('days',)
    """
    sample_dims = _get_sample_dims(sample_dims)
    draws = GuideDraws(svi, args, kwargs, vectorize=vectorize)
    if draws.enumerated_names and is_one_by_one(draws.model):  # whose observations are one factor in a batch
        vectorize = False
        draws = GuideDraws(svi, args, kwargs, vectorize=False)
    groups = collect_posterior(
        draws,
        num_samples,
        batch_size,
        posterior_predictive=posterior_predictive,
        log_likelihood=log_likelihood,
    )
    log_weights = groups["sample_stats"]["log_weight"]
    if diagnosis is None:
        diagnosis = assess(svi, draws, log_weights, args, kwargs, batch_size, vectorize)
        if (warning := _warning(diagnosis)) is not None:
            warnings.warn(warning, stacklevel=2)
    if weighted is None:
        weighted = diagnosis.asks_for_weights
    smoothed, k_hat = pareto_smooth(log_weights)
    attrs = {**_attributes(svi), **_verdict(diagnosis), "pareto_k_hat": k_hat, "weighted": int(weighted)}
    if weighted:
        index = resample(smoothed, num_samples)
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
        _add_history(data, svi.history, sample_dims)
    return data


def _verdict(diagnosis: Diagnosis) -> dict[str, Any]:
    attrs: dict[str, Any] = {"verdict": diagnosis.level.headline}
    if diagnosis.ladder is not None:
        attrs["num_lost_parts"] = len(diagnosis.ladder.lost)
        attrs["lost_share"] = diagnosis.ladder.lost_share
    if diagnosis.reach is not None and diagnosis.reach.is_known:
        attrs["share_out_of_reach"] = diagnosis.reach.share
    return attrs


def _warning(diagnosis: Diagnosis) -> str | None:
    """Return a warning about draws that do not represent the posterior, or None."""
    if diagnosis.level <= Level.USABLE_WITH_WEIGHTS:
        return None
    if diagnosis.level == Level.NOT_ANNEALED:
        return (
            f"The fit stands at inverse temperature {rounded(diagnosis.inverse_temperature)}: the draws are "
            f"of a tempered posterior, not of the posterior. Anneal to 1, for example with svi.run()."
        )
    if diagnosis.ladder is not None and diagnosis.ladder.lost:
        return f"{diagnosis.ladder} The draws lack it."
    return (
        f"The verdict on the fit is {diagnosis.level.headline}: neither the draws nor weights of them stand "
        f"for the posterior. Print diagnose(...) of it for what to do."
    )


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
    # None where the guide chooses the number itself, and NetCDF holds no None.
    if getattr(guide, "num_transforms", None) is not None:
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
    known = [["chain", "draw"]] if _has_old_arviz() else [["chain", "draw"], ["sample"]]
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
    """Convert the groups by the ArviZ that is installed."""
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


def _add_history(data: Any, history: AnnealingHistory, sample_dims: list[str]) -> None:
    """Add the stages of a fit as group ``annealing``, with the loss of every step.

    It has a chain dimension, so that several fits can be concatenated.
    """
    import xarray

    stages = history.stages
    columns: dict[str, tuple[str, Any]] = {
        name: ("stage", [np.nan if value is None else value for value in (getattr(s, name) for s in stages)])
        for name in _STAGE_FIELDS
    }
    columns["loss"] = "step", history.losses
    coords = {"stage": np.arange(len(stages)), "step": np.arange(history.num_steps)}
    dataset = xarray.Dataset(
        {name: (dim, np.asarray(values, dtype=float)) for name, (dim, values) in columns.items()},
        coords=coords,
    )
    if len(sample_dims) == 2:
        dataset = dataset.expand_dims(chain=[0])
    if _has_old_arviz():
        data.add_groups({"annealing": dataset})
    else:
        data["annealing"] = xarray.DataTree(dataset)
