r"""Rank-normalized split R-hat: do chains agree, in bulk and in spread, whatever their tails are?

Draws of all chains are replaced by normal scores of their ranks, :math:`\Phi^{-1}((r - 3/8) / (S + 1/4))`,
chains are split into halves, and R-hat is the root of the total variance over that within them. It is the
larger one of that of the draws and of their distances from the median, which shows chains that differ in
spread.

Source: Vehtari et al., *Rank-normalization, folding, and localization: an improved R-hat*, Bayesian
Analysis 16 (2021).
"""

from __future__ import annotations

import torch
from pyro.ops import stats
from torch import Tensor

__all__ = ["rank_normalized_r_hat"]


def rank_normalized_r_hat(draws: Tensor) -> Tensor:
    """Return R-hat of every number, NaN with fewer than four draws.

    :param draws: shape ``(chains, draws, ...)``.

    Example::

        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> bool(rank_normalized_r_hat(draws) < 1.01), bool(rank_normalized_r_hat(draws.exp().exp()) < 1.01)
        (True, True)
        >>> draws[0] *= 2.0  # one chain too wide
        >>> bool(rank_normalized_r_hat(draws) > 1.05)
        True
    """
    num_draws = draws.shape[1]
    draws = draws.double()
    if num_draws < 4:
        return draws.new_full(draws.shape[2:], torch.nan)
    draws = draws[:, : num_draws - num_draws % 2]
    median = draws.reshape(-1, *draws.shape[2:]).median(0).values
    both = [_normal_scores(draws), _normal_scores((draws - median).abs())]
    values = [stats.split_gelman_rubin(scores, chain_dim=0, sample_dim=1) for scores in both]
    return torch.maximum(*values)


def _normal_scores(draws: Tensor) -> Tensor:
    """Return the normal quantiles of the ranks among all chains; equal draws have their mean rank."""
    flat = draws.reshape(-1, *draws.shape[2:]).movedim(0, -1).contiguous()
    ordered = flat.sort(-1).values
    below = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    rank = (below + up_to + 1).double() / 2
    scores = torch.special.ndtri((rank - 3 / 8) / (flat.shape[-1] + 1 / 4))
    return scores.movedim(-1, 0).reshape(draws.shape)
