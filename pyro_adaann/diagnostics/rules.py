"""From measurements to a verdict: one rule for each, in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from pyro_adaann.diagnostics.measurements import Measurements
from pyro_adaann.diagnostics.numbers import percent, rounded

__all__ = ["Finding", "Level", "findings"]

#: Divergence in nats from which a guide should be corrected: between normal distributions of equal
#: width it is a shift of the mean by sqrt(2 * 0.05) = 0.3 standard deviations.
_NOTICEABLE_GAP = 0.05
#: Divergence in nats from which a few outliers, and not the bulk of the draws, determine it; likewise if its
#: standard error is more than half of it.
_FAR_GAP = 5.0
#: With a smaller effective sample size the guide is far from the posterior.
_ELSEWHERE = 25.0


class Level(IntEnum):
    """How the draws can be used, from best to worst. A verdict has the worst level of all findings."""

    GOOD = 0
    NOT_FINISHED = 1
    USABLE_WITH_WEIGHTS = 2
    UNRELIABLE = 3
    OUT_OF_REACH = 4
    LOST_PART = 5
    NOT_ANNEALED = 6

    @property
    def headline(self) -> str:
        """The first words of the verdict."""
        return self.name.replace("_", " ")


class Finding(NamedTuple):
    """The result of a rule: a level, which the verdict is at least, and the reason."""

    level: Level
    sentence: str


Rule = Callable[[Measurements], Finding | None]


def findings(measured: Measurements) -> list[Finding]:
    """Return the findings, the worst first. A fit that is not annealed has no other finding."""
    tempered = _not_annealed(measured)
    if tempered is not None:
        return [tempered]
    found = sorted(filter(None, (rule(measured) for rule in _ALARMS)), key=lambda f: -f.level)
    if not any(finding.level > Level.USABLE_WITH_WEIGHTS for finding in found):
        # Beside an alarm no advice about weights is given.
        gap = _gap(measured)
        if gap.level > Level.GOOD or not found:
            found = sorted([*found, gap], key=lambda f: -f.level)
    return found + list(filter(None, (note(measured) for note in _NOTES)))


def _not_annealed(m: Measurements) -> Finding | None:
    if m.is_annealed:
        return None
    return Finding(
        Level.NOT_ANNEALED,
        f"The fit stands at inverse temperature {rounded(m.inverse_temperature)}: the guide is of a tempered "
        f"posterior, wider than the posterior, and its draws are no posterior draws. Go on to inverse "
        f"temperature 1, for example with svi.run().",
    )


def _ladder(m: Measurements) -> Finding | None:
    if m.ladder is None or not m.ladder.lost:
        return None
    return Finding(
        Level.LOST_PART,
        f"{m.ladder} The guide's draws, and weights of them, do not stand for the posterior. Draws of all "
        f"rungs together may (mixture_draws); or anneal again from the rung below the loss (svi.restart), "
        f"with smaller steps.",
    )


def _thermodynamic(m: Measurements) -> Finding | None:
    if m.lost_share is None or (m.ladder is not None and m.ladder.lost):
        return None
    return Finding(
        # With unreliable weights the evidence by weights may be the one that is wrong.
        Level.LOST_PART if m.has_reliable_weights else Level.UNRELIABLE,
        f"Thermodynamic integration finds more evidence than the guide's draws: {percent(m.lost_share)} of "
        f"the posterior may be in a part that the guide lost while annealing, such as a mode. Anneal more "
        f"slowly (smaller tolerance, more steps per stage).",
    )


def _reach(m: Measurements) -> Finding | None:
    if m.reach is None or not m.reach.is_short:
        return None
    return Finding(
        # Unreliable weights are the more serious finding.
        Level.OUT_OF_REACH if m.has_reliable_weights else Level.UNRELIABLE,
        f"{m.reach}: the same guide from a wider base finds it, and no draw of the guide itself comes there, "
        f"so that no weights make up for it. Fit again from a base at least "
        f"{rounded(max(m.reach.factor, 1.25), 2)} times as wide there (base_scale), from one that lies "
        f"nearer (base_loc), on another path, or with a more flexible guide.",
    )


def _unknown_reach(m: Measurements) -> Finding | None:
    if m.reach is None or m.reach.is_known or m.reach.is_short:
        return None
    return Finding(
        Level.UNRELIABLE,
        "Draws from wider bases cannot tell whether posterior is out of reach of the fit: a few of them have "
        "nearly all of their weight. Tails are then too short, and the evidence is too low. Fit again from a "
        "wider base (base_scale), or with a more flexible guide.",
    )


def _broken(m: Measurements) -> Finding | None:
    if not m.has_many_broken:
        return None
    cause = f" ({m.broken_cause})" if m.broken_cause else ""
    return Finding(
        Level.UNRELIABLE,
        f"The model has no finite log density at {percent(m.broken_share)} of the draws{cause}. Look for the "
        f"cause there first: overflow, a parameter outside of its constraint (a negative scale), or a guide "
        f"wider than the support.",
    )


def _tail(m: Measurements) -> Finding | None:
    if m.has_reliable_weights or m.has_many_broken:
        return None
    text = (
        f"With k-hat {m.k_hat:.2f} the guide misses part of what the draws show of the posterior, and "
        f"importance weights cannot make up for it: do not use its intervals or the log evidence."
    )
    if m.ess < _ELSEWHERE:
        return Finding(
            Level.UNRELIABLE,
            f"{text} A few draws have almost all the weight, so the posterior lies where the guide has "
            f"little mass. Use a base that covers the posterior (base_loc, base_scale), or another path, "
            f"before more layers or steps.",
        )
    if m.has_nearly_equal_weights:
        text += (
            " Its weights are nearly equal: what it misses is either next to nothing or a part of its own. "
            "Wider draws or a ladder tell which (AdaAnnSVI(ladder=Ladder())); more draws settle the k-hat."
        )
    return Finding(
        Level.UNRELIABLE,
        f"{text} The guide is often too narrow then: a more flexible one, more final steps or a smaller "
        f"learning rate at the end may help.",
    )


def _particles(m: Measurements) -> Finding | None:
    if m.opinion is None or not m.opinion.is_reliable or m.opinion.agrees:
        return None
    first = f" The largest difference: {m.opinion.remarks[0]}." if m.opinion.remarks else ""
    if m.opinion.lost_share is not None:
        return Finding(
            Level.LOST_PART if m.has_reliable_weights else Level.UNRELIABLE,
            f"AnnealedSMC finds more evidence than the guide's draws: they lack about "
            f"{percent(m.opinion.lost_share)} of the posterior.{first} Use its draws, or fit again.",
        )
    if not first:
        return None
    return Finding(
        Level.USABLE_WITH_WEIGHTS,
        f"The draws of AnnealedSMC differ from those of the guide as they are.{first}",
    )


def _unfinished(m: Measurements) -> Finding | None:
    if m.is_done is not False:
        return None
    return Finding(Level.NOT_FINISHED, "The fit has not taken all its final steps: go on with svi.run().")


def _gap(m: Measurements) -> Finding:
    if m.gap <= _NOTICEABLE_GAP:
        return Finding(Level.GOOD, "The guide's draws can be used as they are, as far as they reach.")
    distance = f"{rounded(m.gap)} +- {rounded(m.gap_se, 2)} nats"
    if m.gap > _FAR_GAP or _FAR_GAP / 10 < m.gap < 2 * m.gap_se:
        text = (
            f"A few draws of the guide are outliers: they put the mean log weight {distance} below the log "
            f"evidence, and the other draws may be much better than that."
        )
    else:
        text = (
            f"The guide is {distance} from the posterior, enough to move a mean by up to "
            f"{rounded(m.largest_shift, 2)} standard deviations."
        )
    return Finding(
        Level.USABLE_WITH_WEIGHTS,
        f"{text} The weights are reliable: use weighted means or resampled draws (importance_draws, "
        f"to_arviz).",
    )


def _harmless(m: Measurements) -> Finding | None:
    if m.k_hat <= m.k_threshold or not m.is_tail_harmless:
        return None
    return Finding(
        Level.GOOD,
        f"The k-hat of {m.k_hat:.2f} is no alarm here: the weights are nearly equal, and draws from wider "
        f"bases find next to nothing that the guide lacks.",
    )


def _small_reach(m: Measurements) -> Finding | None:
    if m.reach is None or not m.reach.is_known or not m.reach.is_significant or m.reach.is_short:
        return None
    return Finding(
        Level.GOOD,
        f"{m.reach}; it changes no mean by more than {rounded(m.reach.effect, 1)} standard deviations, and "
        f"no standard deviation by more than {percent(math.expm1(m.reach.effect))}.",
    )


def _untracked(m: Measurements) -> Finding | None:
    if not m.was_untracked:
        return None
    num_behind = max(m.num_untracked, m.num_stalled)
    return Finding(
        Level.GOOD,
        f"In {num_behind} of {m.num_stages} stages the guide did not keep up with the tempered posterior, "
        f"which is where parts get lost: more steps for a stage (max_num_steps), more transforms, or smaller "
        f"steps of the schedule may help. A second seed should find the same log evidence.",
    )


def _scaled(m: Measurements) -> Finding | None:
    if not m.is_scaled:
        return None
    return Finding(
        Level.GOOD,
        "The model scales its log density (poutine.scale, or a mini-batch that stands for more data): the "
        "verdict is about these arguments, not about all data.",
    )


def _judged(m: Measurements) -> Finding | None:
    if m.opinion is None:
        return None
    if not m.opinion.is_reliable:
        text = "The particles of AnnealedSMC are no judge yet: see their result for the reason."
    elif m.opinion.unseen_share is not None:
        text = (
            f"AnnealedSMC misses about {percent(m.opinion.unseen_share)} of what the guide has found: take "
            f"more particles."
        )
    elif m.opinion.agrees:
        text = "AnnealedSMC agrees with the guide in evidence, marginals and shares of modes."
    else:
        return None
    return Finding(Level.GOOD, text)


_ALARMS: tuple[Rule, ...] = (
    _ladder,
    _broken,
    _tail,
    _reach,
    _unknown_reach,
    _thermodynamic,
    _particles,
    _unfinished,
)
#: These change no level.
_NOTES: tuple[Rule, ...] = (_harmless, _small_reach, _untracked, _scaled, _judged)
