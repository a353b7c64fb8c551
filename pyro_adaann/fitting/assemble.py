"""A result out of what was fitted: the flows that count, and a nested Laplace approximation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro_adaann.diagnostics.rules import Finding, Level
from pyro_adaann.fitting.attempts import BATCH_SIZE, Attempt
from pyro_adaann.fitting.clock import Clock
from pyro_adaann.fitting.combine import choose, judge, summary_findings, tail_findings
from pyro_adaann.fitting.compare import Agreement, compare_fits
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.direct import Direct
from pyro_adaann.fitting.mixture import alone, weigh_guides
from pyro_adaann.fitting.moments import measure_moments
from pyro_adaann.fitting.necks import Nested, complete
from pyro_adaann.fitting.result import FitResult, FitSummary
from pyro_adaann.fitting.second_look import lost_of
from pyro_adaann.sampling.result import SMCResult

__all__ = ["result_of_attempts", "result_without_flow"]


def result_of_attempts(
    model: Callable[..., Any],
    coordinates: Coordinates,
    attempts: Sequence[Attempt],
    nested: Nested | None,
    num_samples: int,
    clock: Clock,
    seen: Sequence[Finding] = (),
    looks: Sequence[SMCResult] = (),
) -> FitResult:
    """Return the result of flows.

    :param model: the model, with its own sites.
    :param coordinates: in which it was fitted.
    :param attempts: all, the first one first.
    :param nested: a nested Laplace approximation, None if there is none.
    :param num_samples: draws of every guide.
    :param clock: of the whole fit.
    :param seen: what else is known of it.
    :param looks: particles of the posterior, of which the guides have to hold nearly all.
    """
    args, kwargs = coordinates.args, coordinates.kwargs
    chosen = choose(attempts)
    guides: list[Any] = [attempt.svi.guide for attempt in chosen]
    if len(chosen) == 1:
        mixture = alone(chosen[0].draws)
    else:
        mixture = weigh_guides(coordinates.model, guides, args, kwargs, num_samples, BATCH_SIZE)
        mixture = mixture._replace(draws=coordinates.restore(mixture.draws))
    moments = measure_moments(mixture.draws.samples, mixture.draws.log_weights)
    diagnosis, remarks = judge(chosen, mixture.log_weights, moments)
    best = max(chosen, key=lambda a: a.diagnosis.ess)
    completed, is_witnessed = None, nested is not None and nested.is_witness
    if nested is not None:
        guide = best.svi.guide
        completed = complete(coordinates, nested, guides, guide, moments, diagnosis, num_samples)
    if completed is not None:
        assert nested is not None
        guides, mixture, moments = [*guides, nested.guide], completed.mixture, completed.moments
        diagnosis, remarks = completed.diagnosis, [completed.remark, *remarks]
    agreements = dict(
        zip(map(id, chosen), compare_fits(mixture.draws, mixture.own_log_weights[: len(chosen)]), strict=True)
    )
    if diagnosis.level <= Level.USABLE_WITH_WEIGHTS:
        # Tails that the fits alone do not determine, a witness may.
        others = [] if completed is not None and is_witnessed else [attempt.moments for attempt in chosen]
        remarks = [*remarks, *tail_findings([moments, *others])]
    seen = [*seen, *lost_of(coordinates, guides, diagnosis.log_evidence, looks)]
    return FitResult(
        draws=mixture.draws,
        diagnosis=diagnosis,
        remarks=(*remarks, *seen, *summary_findings(attempts)),
        fits=tuple(_summarize(attempt, agreements.get(id(attempt))) for attempt in attempts),
        seconds=clock.passed,
        guides=tuple(guides),
        svi=best.svi,
        call=(model, args, kwargs),
        centered=coordinates.centered,
    )


def _summarize(attempt: Attempt, agreement: Agreement | None) -> FitSummary:
    diagnosis = attempt.diagnosis
    share, difference, where = agreement or (None, None, "")
    return FitSummary(
        log_evidence=diagnosis.log_evidence,
        log_evidence_se=diagnosis.log_evidence_se,
        headline=diagnosis.level.headline,
        width=max(attempt.plan.widths.values(), default=1.0),
        num_steps=attempt.svi.history.num_steps,
        seconds=attempt.seconds,
        share=share,
        difference=difference,
        where=where,
    )


def result_without_flow(
    model: Callable[..., Any], coordinates: Coordinates, direct: Direct, clock: Clock
) -> FitResult:
    """Return the result of a nested Laplace approximation alone."""
    draws, diagnosis = direct.draws, direct.diagnosis
    remarks = [*direct.remarks, *tail_findings([measure_moments(draws.samples, draws.log_weights)])]
    summary = FitSummary(
        log_evidence=diagnosis.log_evidence,
        log_evidence_se=diagnosis.log_evidence_se,
        headline=diagnosis.level.headline,
        width=1.0,
        num_steps=0,
        seconds=clock.passed,
        share=1.0,
        difference=0.0,
        where="",
    )
    return FitResult(
        draws=draws,
        diagnosis=diagnosis,
        remarks=tuple(remarks),
        fits=(summary,),
        seconds=clock.passed,
        guides=(direct.nested.guide,),
        svi=None,
        call=(model, coordinates.args, coordinates.kwargs),
        centered=coordinates.centered,
    )
