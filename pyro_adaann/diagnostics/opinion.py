"""A second judge of a fit: what particles have found that the guide lacks, or the other way round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_adaann.diagnostics.differences import Difference, compare_marginals
from pyro_adaann.diagnostics.importance import importance_draws
from pyro_adaann.diagnostics.mode_shares import ModeShare, find_modes
from pyro_adaann.diagnostics.model_and_guide import Fit
from pyro_adaann.diagnostics.numbers import labels, percent

__all__ = ["AnnealedDraws", "SecondOpinion", "second_opinion"]

#: In units of standard errors.
_SIGNIFICANT = 4.0


class AnnealedDraws(Protocol):
    """What is asked of the particles; the result of :class:`~pyro_adaann.AnnealedSMC` has it."""

    @property
    def samples(self) -> Mapping[str, Tensor]:
        """Draws by site."""

    @property
    def log_weights(self) -> Tensor:
        """Their log weights, group after group."""

    @property
    def group_log_evidences(self) -> Tensor:
        """Log evidence of every group."""

    @property
    def log_evidence(self) -> float:
        """Log evidence."""

    @property
    def log_evidence_error(self) -> float:
        """Its standard error."""

    @property
    def is_done(self) -> bool:
        """Whether the draws are of the posterior."""

    @property
    def num_unforgotten(self) -> int:
        """Number of inverse temperatures at which the moves were too few."""

    @property
    def is_lagging(self) -> bool:
        """Whether the moves still carried all particles the same way."""


@dataclass(frozen=True)
class SecondOpinion:
    """What :func:`second_opinion` has found; printed, it says so in words.

    :param log_evidence: of the particles.
    :param log_evidence_error: its standard error.
    :param guide_log_evidence: from the guide's importance weights.
    :param guide_log_evidence_error: its standard error, too small where the guide misses a part.
    :param differences: of every latent number, largest first.
    :param modes: shares of the modes that either has.
    :param is_reliable: whether the particles had forgotten everywhere, without a drift, and reached t = 1.

    Example::

        >>> opinion = SecondOpinion(-1.5, 0.05, -1.9, 0.01, (), (), True)
        >>> round(opinion.evidence_gap, 1), opinion.agrees
        (0.4, False)
    """

    log_evidence: float
    log_evidence_error: float
    guide_log_evidence: float
    guide_log_evidence_error: float
    differences: tuple[Difference, ...]
    modes: tuple[ModeShare, ...]
    is_reliable: bool

    @property
    def evidence_gap(self) -> float:
        """Log evidence of the particles minus that of the guide: positive where the guide misses mass."""
        return self.log_evidence - self.guide_log_evidence

    @property
    def has_evidence_gap(self) -> bool:
        """Whether the gap is more than noise and than a twentieth of the evidence."""
        error = math.hypot(self.log_evidence_error, self.guide_log_evidence_error)
        return abs(self.evidence_gap) > max(_SIGNIFICANT * error, 0.05)

    @property
    def lost_share(self) -> float | None:
        """Share of the posterior that the guide's draws miss; None if the evidences do not show any."""
        return -math.expm1(-self.evidence_gap) if self.has_evidence_gap and self.evidence_gap > 0 else None

    @property
    def unseen_share(self) -> float | None:
        """Share of what the guide has found that the particles miss; likewise."""
        return -math.expm1(self.evidence_gap) if self.has_evidence_gap and self.evidence_gap < 0 else None

    @property
    def remarks(self) -> list[str]:
        """Modes, those that the guide lacks first, then latent numbers, that differ by more than noise."""
        modes = sorted(self.modes, key=lambda mode: mode.guide - mode.particles)
        parts: list[ModeShare | Difference] = [*modes, *self.differences]
        return [str(part) for part in parts if part.matters]

    @property
    def agrees(self) -> bool:
        """Whether neither evidences, marginals nor shares of modes differ by more than noise."""
        return not self.has_evidence_gap and not self.remarks

    def __str__(self) -> str:
        lines = [
            f"log evidence: particles {self.log_evidence:.3f} +- {self.log_evidence_error:.3f}, guide "
            f"{self.guide_log_evidence:.3f} +- {self.guide_log_evidence_error:.3f}"
        ]
        if not self.is_reliable:
            lines.append(
                "The particles are no judge yet: they had not forgotten at some temperatures, did not reach "
                "1, or their groups disagree or are one. Allow more moves, or more particles."
            )
        if self.agrees:
            lines.append("Guide and particles agree.")
        if self.lost_share is not None:
            lines.append(f"The guide's draws miss about {percent(self.lost_share)} of the posterior.")
        if self.unseen_share is not None:
            lines.append(
                f"The particles miss about {percent(self.unseen_share)} of what the guide has found: take "
                f"more of them."
            )
        return "\n".join(lines + self.remarks[:10])


def second_opinion(
    svi: Fit,
    result: AnnealedDraws,
    *args: Any,
    num_samples: int = 10_000,
    vectorize: bool = True,
    **kwargs: Any,
) -> SecondOpinion:
    """Compare a fit with particles of the same posterior: evidence, marginals, and shares of modes.

    The guide's own draws are compared, without weights, since those are what is used of a fit.
    ``diagnose(svi, ..., smc=result)`` has the comparison in its verdict.

    :param svi: an `AdaAnnSVI`, a `pyro.infer.SVI`, or a pair ``(model, guide)``.
    :param result: of :class:`AnnealedSMC` on the same model and data.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: number of draws of the guide.
    :param vectorize: whether model and guide run for a batch at once.
    :raises ValueError: if a site of the model is missing in the result.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_adaann import AnnealedSMC
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> result = AnnealedSMC(model, num_particles=2048, seed=0).run(progress_bar=False)
        >>> narrow = AutoNormal(model, init_scale=0.3)  # the exact sd is 0.7
        >>> second_opinion((model, narrow), result).agrees
        False
    """
    draws = importance_draws(svi, *args, num_samples=num_samples, vectorize=vectorize, **kwargs)
    missing = [name for name in draws.samples if name not in result.samples]
    if missing:
        raise ValueError(
            f"Expected particles of the same model; got none for {', '.join(missing)}. Run AnnealedSMC on "
            f"the model of the fit (svi.model)."
        )
    weights = draws.log_p - draws.log_q
    weights = torch.where(torch.isfinite(weights), weights, -torch.inf)
    log_mean = float(weights.logsumexp(0)) - math.log(len(weights))
    error = float((weights - log_mean).exp().std()) / math.sqrt(len(weights))
    names = [label for name, value in draws.samples.items() for label in labels(name, value.shape[1:])]
    guide = _columns(draws.samples)
    particles = _columns({name: result.samples[name] for name in draws.samples})
    weighted = (names, guide, particles, result.log_weights, len(result.group_log_evidences))
    return SecondOpinion(
        log_evidence=result.log_evidence,
        log_evidence_error=result.log_evidence_error,
        guide_log_evidence=log_mean,
        guide_log_evidence_error=error,
        differences=compare_marginals(*weighted),
        modes=find_modes(*weighted),
        is_reliable=result.is_done
        and not (result.num_unforgotten or result.is_lagging)
        and result.log_evidence_error < 0.5,
    )


def _columns(samples: Mapping[str, Tensor]) -> Tensor:
    """Return draws as a matrix, a column for every latent number."""
    return torch.cat([value.reshape(len(value), -1).double() for value in samples.values()], dim=1)
