"""Several fits of one posterior, put together: which of them count, and the verdict on their mixture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from pyro_adaann.diagnostics.diagnose import statistics
from pyro_adaann.diagnostics.numbers import percent
from pyro_adaann.diagnostics.rules import Finding, Level
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.attempts import Attempt, End
from pyro_adaann.fitting.moments import Moments

__all__ = [
    "choose",
    "finds_more",
    "is_good_alone",
    "is_settled",
    "is_witness",
    "judge",
    "summary_findings",
    "tail_findings",
]

#: A fit is left out of the mixture if it has less than this part of the best one's effective draws, and does
#: not see more evidence.
_MIN_PART = 0.1
#: Standard errors by which evidences differ, beyond a share of the posterior that does not matter.
_NUM_ERRORS, _NEGLIGIBLE_SHARE = 3.0, 0.02
#: Shape of the tail up to which a fit is a witness of others, where this share of its draws counts.
_MAX_SHAPE, _MIN_ESS_SHARE = 1.0, 0.1
#: Bound on the change of a mean by the weights, in sds, up to which they hardly differ.
_SMALL_SHIFT = 0.1
#: Numbers that are named in a sentence.
_MAX_NAMES = 4


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
    """Whether an attempt surely holds more of the posterior than another, by its evidence or by a moment."""
    if _excess(attempt.diagnosis, other.diagnosis) > 0:
        return True
    return _is_usable(attempt) and bool(other.moments.lacks(attempt.moments))


def is_good_alone(attempt: Attempt) -> bool:
    """Whether the draws of a fit are good as they are, or with weights that hardly differ.

    Some outliers of a guide put its mean log weight nats below the evidence, and have no weight.
    """
    found = attempt.diagnosis
    return found.level == Level.GOOD or (_is_usable(attempt) and found.largest_shift <= _SMALL_SHIFT)


def is_settled(attempts: Sequence[Attempt]) -> bool:
    """Whether a usable fit and another, usable or nearly so, agree, and no fit finds more."""
    complete = [a for a in attempts if not any(finds_more(other, a) for other in attempts if other is not a)]
    pairs = permutations(complete, 2)
    return any(_is_usable(a) and is_witness(other) and _agree(a, other) for a, other in pairs)


def _agree(attempt: Attempt, other: Attempt) -> bool:
    """Whether neither of two complete fits has a mean or sd that the other lacks."""
    return not (attempt.moments.lacks(other.moments) or other.moments.lacks(attempt.moments))


def _is_usable(attempt: Attempt) -> bool:
    return attempt.diagnosis.level <= Level.USABLE_WITH_WEIGHTS


def is_witness(attempt: Attempt) -> bool:
    """Whether a fit is usable, or would be so with a tail that is a little lighter.

    Such a one need not be exact to show a part of the posterior that the others have lost.
    """
    found = attempt.diagnosis
    if found.k_hat > _MAX_SHAPE or found.ess < _MIN_ESS_SHARE * found.num_samples:
        return _is_usable(attempt)
    lighter = dataclasses.replace(found, k_hat=min(found.k_hat, found.k_threshold))
    return lighter.level <= Level.USABLE_WITH_WEIGHTS


def judge(
    chosen: Sequence[Attempt], log_weights: Tensor, moments: Moments
) -> tuple[Diagnosis, list[Finding]]:
    """Return the diagnosis of a mixture of fits, and what else is to be said of it.

    Tail, effective draws and evidence are those of the mixture. Of reach, ladder and the way through the
    temperatures each fit knows its own: those of the best fit count that holds all that the mixture holds,
    and without such a fit there is an alarm.

    :param chosen: the fits.
    :param log_weights: of the draws of all, against the mixture.
    :param moments: of these draws.
    """
    if len(chosen) == 1:
        return chosen[0].diagnosis, []
    found = statistics(log_weights)
    mixture = dataclasses.replace(chosen[0].diagnosis, **found, ladder=None, reach=None, thermodynamic=None)
    lacking = [attempt.moments.lacks(moments) for attempt in chosen]
    whole = [
        attempt
        for attempt, name in zip(chosen, lacking, strict=True)
        if _excess(mixture, attempt.diagnosis) <= 0 and not name
    ]
    best = min(whole or chosen, key=lambda a: (a.diagnosis.level, -a.diagnosis.ess))
    diagnosis = dataclasses.replace(best.diagnosis, **found)
    if len(whole) == len(chosen):
        return diagnosis, []
    shares = [percent(math.exp(min(a.diagnosis.log_evidence - mixture.log_evidence, 0.0))) for a in chosen]
    held = f"they hold {', '.join(shares)} of what they hold together"
    names = sorted({name for name in lacking if name})[:_MAX_NAMES]
    if names:
        held += f", with other means or standard deviations of {', '.join(names)}"
    if len(whole) < 2:
        sentence = (
            f"No two of {len(chosen)} fits agree with all of them together ({held}), so that more fits may "
            f"find still more. Ask for more of them (num_fits)."
        )
        return diagnosis, [Finding(Level.UNRELIABLE, sentence)]
    sentence = f"Not all of {len(chosen)} fits agree: {held}. The draws are of their mixture."
    return diagnosis, [Finding(Level.USABLE_WITH_WEIGHTS, sentence)]


def tail_findings(found: Sequence[Moments]) -> list[Finding]:
    """Return which standard deviations the draws do not determine.

    :param found: moments of the same numbers: those of every fit, and of all of them together. A guide that
        lacks a tail may hide it in one of them.
    """
    known = torch.stack([moments.is_determined for moments in found]).all(0)
    names = [name for name, is_known in zip(found[0].names, known.tolist(), strict=True) if not is_known]
    if not names:
        return []
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    sentence = (
        f"The draws do not determine the standard deviation of {', '.join(names[:_MAX_NAMES])}{more}: the "
        f"tail is so heavy that it may be infinite. Use quantiles there."
    )
    return [Finding(Level.GOOD, sentence)]


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
