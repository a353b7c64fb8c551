r"""Parts of the posterior that were lost while annealing, by comparing the rungs of a ladder.

Numbers computed from the draws of the final guide do not show a mode without draws; the guide at a lower
inverse temperature may still have draws there. With draws :math:`z_i \sim q_r` of a rung, weighted to the
tempered density
:math:`p_{t_s}` of a rung s above it, a part of that density is lost where rung s has almost no density:

.. math:: \text{lost share} = \sum_i W_i\, 1\Bigl[c_s(z_i) < \tfrac{1}{20} \min(1, c(z_i))\Bigr], \qquad
          W_i \propto \frac{p_{t_s}(z_i)}{q_r(z_i)}, \qquad c_s(z) = \frac{q_s(z)}{p_{t_s}(z)}

The coverage :math:`c_s` of a rung is compared with c, the largest one of rung r and of some rungs below it: a
guide that is too wide covers everything badly from the start, while one that loses a mode gradually covers it
well at first. Neighboring rungs overlap in any dimension; draws of a wide rung reach the posterior itself, at
t = 1, only in few dimensions.

The normalizer of :math:`p_{t_s}` is the larger of two estimates: from the draws of rung r, and from those of
rung s, to whose evidence the lost part is added. If the posterior lies many widths of the base away, the
draws of a lower rung hold almost none of its mass; normalized by their own evidence alone, a negligible part
would look like the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pyro_adaann.checks import check_count
from pyro_adaann.diagnostics.numbers import percent, rounded
from pyro_adaann.diagnostics.rung_draws import Comparison, RungDraws, Rungs
from pyro_adaann.state.rungs import Rung
from pyro_adaann.svi import AdaAnnSVI

__all__ = ["LadderReport", "LostPart", "find_lost_parts"]

#: Coverage below this value, or below this share of the earlier coverage, counts as lost.
_MIN_COVER = 1 / 20
#: How many rungs below the one compared the earlier coverage is taken from.
_LOOKBACK = (2, 4)
#: A smaller share is a tail, not a mode: of the posterior, and of a tempered density, where a guide that has
#: not converged lacks more.
_MIN_SHARE, _MIN_TEMPERED_SHARE = 0.05, 0.15
#: Standard errors that a share has to be above zero, and above the smallest one that counts.
_NUM_ERRORS, _NUM_ERRORS_ABOVE = 3.0, 2.0
#: Draws of a rung at first; fewer, down to a number, of a model of many log densities a draw. More are taken
#: while a loss cannot be excluded.
_FIRST_DRAWS, _FEWEST_DRAWS, _MANY_DENSITIES = 5000, 1000, 20_000
#: Smallest effective sample size for a share, and largest shape of the tail of its weights: from a shape of 1
#: on they have no mean, and the error of the share is meaningless.
_MIN_ESS, _MAX_SHAPE = 10.0, 1.0
#: Largest shape that a few times as many draws may reduce to that.
_MAX_SHAPE_IN_REACH = 2.0


@dataclass(frozen=True)
class LostPart:
    """A part of the posterior that the guide lost between two rungs.

    :param rung: the last rung with the part.
    :param lower: inverse temperature of that rung.
    :param upper: inverse temperature of the first rung without the part, 1 for the final guide.
    :param share: share of the tempered density at ``upper`` that is lost.
    :param share_se: standard error of the share.

    Example::

        >>> from pyro_adaann import Rung
        >>> lost = LostPart(Rung(0.1, {}, {}), lower=0.1, upper=0.2, share=0.3, share_se=0.02)
        >>> print(LadderReport(num_rungs=5, lost=[lost], min_ess=0.3))
        30% +- 2.0% of the tempered posterior lost between inverse temperatures 0.1 and 0.2.
    """

    rung: Rung
    lower: float
    upper: float
    share: float
    share_se: float


@dataclass(frozen=True)
class LadderReport:
    """The comparison of the rungs of a ladder.

    :param num_rungs: number of rungs, without the final guide.
    :param lost: parts that were lost and not found again, by rising inverse temperature.
    :param min_ess: smallest effective sample size between neighboring rungs, as a share of the draws; below a
        few percent a loss may not be detected.

    Example::

        >>> print(LadderReport(num_rungs=5, lost=[], min_ess=0.3))
        No part lost between 5 rungs and the guide (least overlap 30%).
    """

    num_rungs: int
    lost: list[LostPart]
    min_ess: float

    @property
    def lost_share(self) -> float:
        """Total share of the posterior that is lost, as estimated from the rungs."""
        return 1 - math.prod(1 - loss.share for loss in self.lost)

    def __str__(self) -> str:
        if not self.lost:
            overlap = f"least overlap {percent(self.min_ess)}"
            return f"No part lost between {self.num_rungs} rungs and the guide ({overlap})."
        return " ".join(
            f"{percent(loss.share)} +- {percent(loss.share_se)} of the tempered posterior lost between "
            f"inverse temperatures {rounded(loss.lower)} and {rounded(loss.upper)}."
            for loss in self.lost
        )


def find_lost_parts(
    svi: AdaAnnSVI,
    *args: Any,
    num_samples: int = 20_000,
    batch_size: int = 1000,
    vectorize: bool = True,
    **kwargs: Any,
) -> LadderReport:
    """Compare every rung of the ladder of a fit with the next two and with the guide.

    A part that is missing in one rung and present in the next was not lost. A part missing in both is
    reported with the inverse temperatures between which it was lost; likewise a part of the posterior that is
    present in the draws of a rung, weighted to t = 1, and missing in the guide.

    :param svi: a fit with a ladder.
    :param args: arguments of model and guide as in ``svi.step``, with ``kwargs``.
    :param num_samples: largest number of draws of a rung. The first 5,000 (of a large model, the first 1,000)
        are all if they exclude a loss.
    :param batch_size: how many at a time.
    :param vectorize: whether model and guide run on a whole batch at once; False is slower and always works.
    :raises ValueError: if the fit has no ladder or has taken no step, if a count is below 1, and as
        :func:`diagnose` does.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_adaann import AutoPlanar, AdaAnnSchedule, Ladder
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> pyro.clear_param_store()  # a new fit
        >>> svi = AdaAnnSVI(model, AutoPlanar(model, 4), pyro.optim.Adam({"lr": 0.01}),
        ...                 Trace_ELBO(num_particles=20, vectorize_particles=True), ladder=Ladder(),
        ...                 schedule=AdaAnnSchedule(0.5), num_initial_steps=20, num_final_steps=20)
        >>> history = svi.run(progress_bar=False)
        >>> find_lost_parts(svi).lost
        []
    """
    check_count("num_samples", num_samples, 1)
    check_count("batch_size", batch_size, 1)
    rungs = Rungs(svi, args, kwargs, batch_size, vectorize)
    looks = _Looks(rungs, num_samples)
    last = len(rungs.rungs) - 1
    found = [looks.look(r) for r in range(last)]

    def loss(r: int, upper: int, share: Comparison) -> LostPart:
        lower, higher = rungs.inverse_temperatures[r], rungs.inverse_temperatures[upper]
        rung = rungs.rungs[r]
        assert rung is not None  # the guide, which is above all of them
        return LostPart(rung, lower, higher, share.share, share.se)

    lost = {r: loss(r, r + 1, look.above[0]) for r, look in enumerate(found) if _are_lost(look.above)}
    # A part found by several rungs was lost above the highest of them; the smallest error gives its share.
    seen = [r for r, look in enumerate(found) if _is_lost(look.afar, _MIN_SHARE)]
    if seen:
        surest = min((found[r].afar for r in seen), key=lambda afar: afar.se)
        lost[seen[-1]] = loss(seen[-1], found[seen[-1]].upper, surest)
    overlaps = [look.above[0].ess / look.num_samples for look in found]
    return LadderReport(last, [lost[r] for r in sorted(lost)], min(overlaps))


def _is_lost(found: Comparison, min_share: float) -> bool:
    has_support = found.ess >= _MIN_ESS and found.k_hat <= _MAX_SHAPE
    is_sure = found.share > max(_NUM_ERRORS * found.se, min_share + _NUM_ERRORS_ABOVE * found.se)
    return has_support and is_sure


def _seems_lost(found: Comparison, min_share: float) -> bool:
    """Whether a part may be lost, so that more draws are worth their cost."""
    return found.share > min_share and found.k_hat <= _MAX_SHAPE_IN_REACH


def _are_lost(above: list[Comparison]) -> bool:
    """Whether a part is missing in all of these rungs: one that is present in the next was not lost."""
    return all(_is_lost(found, _MIN_TEMPERED_SHARE) for found in above)


class _Look(NamedTuple):
    """The comparisons of the draws of one rung.

    :param above: with the next two rungs, each at its own inverse temperature.
    :param afar: with the guide.
    :param upper: the first of these rungs that lacks most of what the guide lacks.
    """

    above: list[Comparison]
    afar: Comparison
    upper: int
    num_samples: int

    @property
    def is_settled(self) -> bool:
        """Whether more draws are not needed: everything that may be lost is known to be."""
        is_open_above = all(_seems_lost(found, _MIN_TEMPERED_SHARE) for found in self.above)
        is_open_afar = _seems_lost(self.afar, _MIN_SHARE)
        return (_are_lost(self.above) or not is_open_above) and (
            _is_lost(self.afar, _MIN_SHARE) or not is_open_afar
        )


class _Looks:
    """The rungs of a fit, compared one after the other from the lowest to the highest."""

    def __init__(self, rungs: Rungs, num_samples: int) -> None:
        self.rungs = rungs
        self._num_samples = num_samples
        self._last = len(rungs.rungs) - 1
        fewer = _FIRST_DRAWS * _MANY_DENSITIES // max(rungs.num_densities, _MANY_DENSITIES)
        self._batch = min(max(fewer, _FEWEST_DRAWS), num_samples)
        self._first = [rungs.draw(r, self._batch) for r in range(self._last + 1)]
        #: Log normalizer of the density of every rung, from its own draws.
        self._log_normalizers = [drawn.log_normalizer(drawn.own) for drawn in self._first]

    def look(self, r: int) -> _Look:
        """Compare the first draws of rung r, and more while a loss cannot be excluded."""
        below = [r - back for back in (0, *_LOOKBACK) if back <= r]
        above = range(r + 1, self._last + 1)[:2]
        scorers = {*below, *above, self._last}
        drawn = self.rungs.score(self._first[r], scorers)
        while not (look := self._compare(drawn, below, above)).is_settled and len(drawn) < self._num_samples:
            more = self.rungs.draw(r, min(self._batch, self._num_samples - len(drawn)))
            drawn.extend(self.rungs.score(more, scorers))
        return look

    def _compare(self, drawn: RungDraws, below: list[int], above: Sequence[int]) -> _Look:
        last, own = self._last, self._log_normalizers
        own[drawn.own] = drawn.log_normalizer(drawn.own)
        best = torch.stack([drawn.log_coverage(k, own[k]) for k in below]).amax(0)
        least = best.clamp(max=0.0) + math.log(_MIN_COVER)
        # Draws far from a density give too small a normalizer, and so do those of a guide that lost a part;
        # too large ones occur by chance only.
        lacking = {
            s: drawn.log_coverage(s, max(drawn.log_normalizer(s), own[s])) < least for s in (*above, last)
        }
        missed = drawn.log_weights(last).softmax(0) * lacking[last]
        upper = next((s for s in lacking if 2 * missed[lacking[s]].sum() >= missed.sum()), last)
        near = [drawn.compare(s, lacking[s], own[s]) for s in above]
        afar = drawn.compare(last, lacking[last], own[last])
        return _Look(near, afar, upper, len(drawn))
