"""One line at the end of a run whose draws need weights."""

from __future__ import annotations

import logging

__all__ = ["advise_weights"]

_logger = logging.getLogger(__name__)

#: With a larger effective share of the draws weights hardly change a mean. Of two modes of weight 1/2 it is
#: that of a guide with .66 and .34.
_ENOUGH = 0.9
_is_said = False


def advise_weights(ess_share: float) -> None:
    """Log, once in a process, that the draws of a fit need weights, if they do.

    :param ess_share: effective sample size of the draws of the last steps, as a share of their number.
    """
    global _is_said
    if _is_said or ess_share >= _ENOUGH:
        return
    _is_said = True
    _logger.warning(
        "Of the draws of the last steps %.0f%% are effective, so that means want weights: take "
        "importance_draws, ask diagnose(svi, ...), or let fit(model, ...) of pyro_adaann do all of it.",
        100 * ess_share,
    )
