"""Several fits of one posterior, put together: which of them count, and the verdict on their mixture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from pyro_adaann.diagnostics.diagnose import statistics
from pyro_adaann.diagnostics.numbers import percent
from pyro_adaann.diagnostics.rules import Finding, Level
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.attempts import Attempt, End

__all__ = ["choose", "finds_more", "is_settled", "judge", "summary_findings"]

#: A fit is left out of the mixture if it has less than this part of the best one's effective draws, and does
#: not see more evidence.
_MIN_PART = 0.1
#: Standard errors by which evidences differ, beyond a share of the posterior that does not matter.
_NUM_ERRORS, _NEGLIGIBLE_SHARE = 3.0, 0.02


def choose(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts whose guides make up the mixture; those at a temperature only if none is done."""
    annealed = [attempt for attempt in attempts if attempt.diagnosis.is_annealed]
    if not annealed:
        return [max(attempts, key=lambda a: a.diagnosis.inverse_temperature)]
    best = max(annealed, key=lambda a: a.diagnosis.ess)
    return [
        attempt
        for attempt in annealed
        if attempt.diagnosis.ess >= _MIN_PART * best.diagnosis.ess
        or _excess(attempt.diagnosis, best.diagnosis) > 0
    ]


def finds_more(attempt: Attempt, other: Attempt) -> bool:
    """Whether an attempt surely holds more of the posterior than another."""
    return _excess(attempt.diagnosis, other.diagnosis) > 0


def is_settled(attempts: Sequence[Attempt]) -> bool:
    """Whether two fits with usable draws agree on the evidence, and no fit finds more."""
    most = max(attempts, key=lambda a: a.diagnosis.log_evidence)
    agreeing = [a for a in attempts if not finds_more(most, a)]
    return sum(a.diagnosis.level <= Level.USABLE_WITH_WEIGHTS for a in agreeing) >= 2


def judge(chosen: Sequence[Attempt], log_weights: Tensor) -> tuple[Diagnosis, list[Finding]]:
    """Return the diagnosis of a mixture of fits, and what else is to be said of it.

    Tail, effective draws and evidence are those of the mixture. Of reach, ladder and the way through the
    temperatures each fit knows its own: those of the best fit count that holds all that the mixture holds,
    and without such a fit there is an alarm.
    """
    if len(chosen) == 1:
        return chosen[0].diagnosis, []
    found = statistics(log_weights)
    mixture = dataclasses.replace(chosen[0].diagnosis, **found, ladder=None, reach=None, thermodynamic=None)
    whole = [attempt for attempt in chosen if _excess(mixture, attempt.diagnosis) <= 0]
    best = min(whole or chosen, key=lambda a: (a.diagnosis.level, -a.diagnosis.ess))
    diagnosis = dataclasses.replace(best.diagnosis, **found)
    shares = [percent(math.exp(min(a.diagnosis.log_evidence - mixture.log_evidence, 0.0))) for a in chosen]
    if len(whole) < min(len(chosen), 2):
        sentence = (
            f"No two of {len(chosen)} fits hold all that they hold together (they hold {', '.join(shares)} "
            f"of it), so that more fits may find still more. Ask for more of them (num_fits)."
        )
        return diagnosis, [Finding(Level.UNRELIABLE, sentence)]
    remarks: list[Finding] = []
    if len(whole) < len(chosen):
        sentence = (
            f"Not all of {len(chosen)} fits agree: they hold {', '.join(shares)} of what they hold together. "
            f"The draws are of their mixture."
        )
        remarks.append(Finding(Level.USABLE_WITH_WEIGHTS, sentence))
    return diagnosis, remarks


def summary_findings(attempts: Sequence[Attempt]) -> list[Finding]:
    """Return what the ends of the attempts say."""
    last = attempts[-1]
    if last.end is End.INTERRUPTED:
        return [Finding(Level.NOT_FINISHED, "The fit was interrupted, and is what there was by then.")]
    if last.end is End.OUT_OF_TIME:
        return [Finding(Level.NOT_FINISHED, "The time was over before all steps were taken (budget).")]
    return []


def _excess(more: Diagnosis, less: Diagnosis) -> float:
    """Return by how many nats one evidence is noticeably above another; at most 0 where it is not surely."""
    error = math.hypot(more.log_evidence_se, less.log_evidence_se)
    return more.log_evidence - less.log_evidence - _NUM_ERRORS * error - _NEGLIGIBLE_SHARE
