r"""What a guide's sites are: draws from a density, how many numbers, and the scale they share with the model.

`poutine.scale` around model and guide multiplies the loss by a number s. It has the same minimum, but the
log weights :math:`s (\log p - \log q)` and the log factors are then those of no density. They are divided by
s. A scale of the model alone is a part of the model, such as the N / B of a mini-batch of B of N data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from pyro_adaann.annealing.tempering import is_delta
from pyro_adaann.processes.rows import PARTICLE_PLATE

__all__ = ["PARTICLE_PLATE", "check_scales", "common_scale", "has_density", "num_latents"]

#: Relative difference of two scales that count as the same.
_TOLERANCE = 1e-4


def has_density(site: Any) -> bool:
    """Whether a guide's site is a draw from a density of the guide's."""
    return not (site["is_observed"] or site_is_subsample(site) or is_delta(site["fn"]))


def num_latents(guide_trace: Trace) -> int:
    """Return how many numbers a guide draws for one particle."""
    total = 0
    for site in _density_sites(guide_trace):
        particles = [frame.size for frame in site["cond_indep_stack"] if frame.name == PARTICLE_PLATE]
        total += site["value"].numel() // max(particles, default=1)
    return total


def common_scale(guide_trace: Trace) -> float:
    """Return the scale of all draws of a guide, without that of sub-sampled plates; 1 if they differ."""
    scales = list(_guide_scales(guide_trace).values())
    if not scales:
        return 1.0
    first = scales[0].flatten()[0] if torch.is_tensor(scales[0]) else scales[0]
    return float(first) if all(_is_close(scale, first) for scale in scales) else 1.0


def check_scales(model_trace: Trace, guide_trace: Trace, weights: dict[str, float]) -> None:
    """Raise a `ValueError` if the guide's draws are scaled and the same sites of the model are not, alike.

    :param weights: what tempering has multiplied the scales of the model's sites by.
    """
    of_guide, common = _guide_scales(guide_trace), common_scale(guide_trace)
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or name not in guide_trace:
            continue
        # An autoguide draws all sites at once, under another name.
        expected = of_guide.get(name, common)
        scale = _own_scale(site) / weights.get(name, 1.0)
        if _is_close(expected, 1.0) or _is_close(scale, expected):
            continue
        # A sub-sampled plate in one of them may be a scale of the user's in the other.
        whole = site["scale"] / weights.get(name, 1.0)
        if name not in of_guide or not _is_close(whole, guide_trace.nodes[name]["scale"]):
            raise ValueError(
                f"Expected draws of the guide and the same sites of the model under one scale; got "
                f"{_text(expected)} in the guide and {_text(scale)} in the model at site {name!r}. Weights "
                f"of draws are then those of no posterior. Put one `poutine.scale` around model and guide, "
                f"or leave it out; that of a mini-batch belongs around the observed sites."
            )


def _guide_scales(guide_trace: Trace) -> dict[str, Any]:
    return {site["name"]: _own_scale(site) for site in _density_sites(guide_trace)}


def _density_sites(guide_trace: Trace) -> list[Any]:
    sites = guide_trace.nodes.values()
    return [site for site in sites if site["type"] == "sample" and has_density(site)]


def _own_scale(site: Any) -> Any:
    """Return the scale of a site without that of its sub-sampled plates, a number or a tensor."""
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size:
            scale = scale * frame.size / frame.full_size
    return scale


def _is_close(a: Any, b: Any) -> bool:
    if torch.is_tensor(a) or torch.is_tensor(b):
        return bool(((a - b).abs() <= _TOLERANCE * abs(b)).all())
    return math.isclose(a, b, rel_tol=_TOLERANCE)


def _text(scale: Any) -> str:
    return f"{float(scale):.4g}" if not torch.is_tensor(scale) or scale.numel() == 1 else "several scales"
