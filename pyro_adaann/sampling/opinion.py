"""A second judge of a fit: what particles have found that the guide lacks, or the other way round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_adaann.diagnostics.importance import importance_draws
from pyro_adaann.diagnostics.model_and_guide import Fit
from pyro_adaann.sampling.result import SMCResult
from pyro_adaann.weights import effective_sample_size

__all__ = ["Difference", "SecondOpinion", "second_opinion"]

#: Differences below these are not worth a word: in sds, as a ratio of sds, and as a share of the draws.
_MEAN, _SD, _SHARE = 0.15, 0.15, 0.1
#: In units of standard errors.
_SIGNIFICANT = 4.0


@dataclass(frozen=True)
class Difference:
    """One number of the posterior, as the guide and as sequential Monte Carlo have it.

    :param name: the site with its index.
    :param mean_shift: mean of the guide minus that of the particles, in the particles' sds.
    :param sd_ratio: sd of the guide over that of the particles.
    :param share: largest difference between the two distribution functions.
    :param where: the value at which it is.
    :param is_below: whether the guide has too little below that value, not above.
    :param noise: what `share` would be by chance, its 99 % quantile roughly.
    """

    name: str
    mean_shift: float
    sd_ratio: float
    share: float
    where: float
    is_below: bool
    noise: float

    @property
    def matters(self) -> bool:
        """Whether it is more than noise and large enough for a word."""
        if self.share < self.noise:
            return False
        is_off = abs(self.mean_shift) > _MEAN or abs(math.log(max(self.sd_ratio, 1e-9))) > _SD
        return is_off or self.share > _SHARE

    def __str__(self) -> str:
        side = "below" if self.is_below else "above"
        return (
            f"{self.name}: mean {self.mean_shift:+.2f} sd, sd x {self.sd_ratio:.2f}; the guide lacks "
            f"{self.share:.0%} of the draws, {side} {self.where:.3g}"
        )


@dataclass(frozen=True)
class SecondOpinion:
    """What :func:`second_opinion` has found; printed, it says so in words.

    :param log_evidence: of the particles.
    :param log_evidence_error: its standard error.
    :param guide_log_evidence: from the guide's importance weights.
    :param guide_log_evidence_error: its standard error, too small where the guide misses a part.
    :param differences: of every latent number, largest first.
    :param is_reliable: whether the particles had forgotten everywhere and reached inverse temperature 1.

    Example::

        >>> opinion = SecondOpinion(-1.5, 0.05, -1.9, 0.01, (), True)
        >>> round(opinion.evidence_gap, 1), opinion.agrees
        (0.4, False)
    """

    log_evidence: float
    log_evidence_error: float
    guide_log_evidence: float
    guide_log_evidence_error: float
    differences: tuple[Difference, ...]
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
    def agrees(self) -> bool:
        """Whether neither the evidences nor the marginals differ by more than noise."""
        return not self.has_evidence_gap and not any(d.matters for d in self.differences)

    def __str__(self) -> str:
        lines = [
            f"log evidence: particles {self.log_evidence:.3f} +- {self.log_evidence_error:.3f}, guide "
            f"{self.guide_log_evidence:.3f} +- {self.guide_log_evidence_error:.3f}"
        ]
        if not self.is_reliable:
            lines.append(
                "The particles are no judge yet: they had not forgotten at some temperatures, did not reach "
                "1, or their groups disagree. Allow more moves, or more particles."
            )
        if self.agrees:
            lines.append("Guide and particles agree.")
        elif self.has_evidence_gap and self.evidence_gap > 0:
            share = -math.expm1(-self.evidence_gap)
            lines.append(f"The guide's draws miss about {share:.0%} of the posterior.")
        elif self.has_evidence_gap:
            share = -math.expm1(self.evidence_gap)
            lines.append(
                f"The particles miss about {share:.0%} of what the guide has found: take more of them."
            )
        lines += [str(difference) for difference in self.differences if difference.matters][:10]
        return "\n".join(lines)


def second_opinion(
    svi: Fit, result: SMCResult, *args: Any, num_samples: int = 10_000, vectorize: bool = True, **kwargs: Any
) -> SecondOpinion:
    """Compare a fit with particles of the same posterior: evidence and the marginal of every latent number.

    The guide's own draws are compared, without weights, since those are what is used of a fit.

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
            f"the model of the fit."
        )
    weights = draws.log_p - draws.log_q
    weights = torch.where(torch.isfinite(weights), weights, -torch.inf)
    log_mean = float(weights.logsumexp(0)) - math.log(len(weights))
    error = float((weights - log_mean).exp().std()) / math.sqrt(len(weights))
    differences = []
    for name, guide in draws.samples.items():
        particles = result.samples[name]
        columns = zip(guide.reshape(len(guide), -1).T, particles.reshape(len(particles), -1).T, strict=True)
        for i, (a, b) in enumerate(columns):
            label = name if guide.dim() == 1 else f"{name}[{_index(i, guide.shape[1:])}]"
            differences.append(_compare(label, a.double(), b.double(), result.log_weights))
    differences.sort(key=lambda difference: -difference.share)
    return SecondOpinion(
        log_evidence=result.log_evidence,
        log_evidence_error=result.log_evidence_error,
        guide_log_evidence=log_mean,
        guide_log_evidence_error=error,
        differences=tuple(differences),
        is_reliable=result.is_done and not result.num_unforgotten and result.log_evidence_error < 0.5,
    )


def _compare(name: str, guide: Tensor, particles: Tensor, log_weights: Tensor) -> Difference:
    kept = log_weights > -torch.inf
    particles, weights = particles[kept], log_weights[kept].softmax(0)
    mean = weights @ particles
    sd = (weights @ (particles - mean).square()).sqrt().clamp(min=1e-300)
    points = torch.cat([guide, particles]).sort().values
    below_guide = torch.searchsorted(guide.sort().values, points, right=True) / len(guide)
    order = particles.argsort()
    total = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
    below_particles = total[torch.searchsorted(particles[order].contiguous(), points, right=True)]
    gap = below_particles - below_guide
    at = int(gap.abs().argmax())
    # Resampled particles share ancestors, so the effective number is at most that of the weights; a fifth
    # of it is cautious.
    ess = effective_sample_size(log_weights[kept]) / 5
    noise = 1.63 * math.sqrt(1 / len(guide) + 1 / ess)
    return Difference(
        name=name,
        mean_shift=float((guide.mean() - mean) / sd),
        sd_ratio=float(guide.std() / sd),
        share=float(gap[at].abs()),
        where=float(points[at]),
        is_below=bool(gap[at] > 0),
        noise=noise,
    )


def _index(flat: int, shape: torch.Size) -> str:
    indices = []
    for size in reversed(shape):
        indices.append(flat % size)
        flat //= size
    return ", ".join(map(str, reversed(indices)))
