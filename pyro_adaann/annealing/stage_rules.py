"""Stage rules: when a stage at one inverse temperature ends.

Without a rule a stage has the number of steps that `AdaAnnSVI` was given. A rule is called after each
further step, with the effective sample size of the guide's draws against the tempered density of the stage::

    rule.is_over(num_steps, ess)

Rules and schedules are independent of each other. To write another, subclass :class:`StageRule`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

from pyro_adaann.checks import check_count

__all__ = ["ESSStageRule", "StageRule"]


class StageRule(ABC):
    """Base class of all stage rules.

    Example::

        >>> class Forever(StageRule):
        ...     def is_over(self, num_steps, ess):
        ...         return num_steps >= 1000
        ...     def is_met(self, ess):
        ...         return True
        >>> Forever().is_over(5, ess=0.9)
        False
    """

    @abstractmethod
    def is_over(self, num_steps: int, ess: float) -> bool:
        """Whether the stage ends here.

        :param num_steps: steps of the stage so far, at least ``num_steps_per_stage``.
        :param ess: effective sample size of the latest draws of the guide against the tempered density,
            as a share of their number, in (0, 1].
        """

    @abstractmethod
    def is_met(self, ess: float) -> bool:
        """Whether the rule's condition holds; false for a stage that only ran out of steps.

        :param ess: as in :meth:`is_over`.
        """

    def after(self, num_untracked: int) -> StageRule:
        """Return the rule for a stage that follows so many in a row that ran out of steps; here this one."""
        return self

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class ESSStageRule(StageRule):
    r"""A stage continues until the guide's draws have a given effective sample size.

    .. math:: \frac{(\sum_i w_i)^2}{n \sum_i w_i^2} \ge \text{target}, \qquad
              w_i = \frac{p_t(z_i)}{q(z_i)}, \quad z_i \sim q

    Modes are lost when the inverse temperature rises faster than the guide adapts. The draws are those of the
    latest training steps, at least 500, at no cost in model runs. A stage that reaches ``max_num_steps``
    first is recorded as not tracked (:attr:`AnnealingStage.is_tracked`), and :func:`diagnose` reports it.

    :param target: share of the draws, in (0, 1).
    :param max_num_steps: largest number of steps of a stage.
    :param patience: after how many steps a stage may end at ``least`` instead. With dozens of latent
        variables a guide comes near a target such as 0.8 in a few steps and to it in many. By default never.
    :param least: that share, from 0 to ``target``.
    :param max_num_untracked: after so many stages in a row that ran out of steps a stage has a quarter of
        them, until one is tracked again: a guide that has fallen so far behind cannot follow, and more steps
        cost minutes. By default never.
    :raises ValueError: if one is out of range.

    Source: Chopin, *A sequential particle filter method for static models*, Biometrika 89 (2002), for the
    effective sample size as the measure of how far two densities of a sequence are apart.

    Example::

        >>> rule = ESSStageRule(0.3, max_num_steps=100)
        >>> rule.is_over(5, ess=0.2), rule.is_over(5, ess=0.4), rule.is_over(100, ess=0.2)
        (False, True, True)
    """

    def __init__(
        self,
        target: float = 0.3,
        *,
        max_num_steps: int = 200,
        patience: int | None = None,
        least: float | None = None,
        max_num_untracked: int | None = None,
    ) -> None:
        if not 0 < target < 1:
            raise ValueError(f"Expected `target` in (0, 1); got {target}.")
        check_count("max_num_steps", max_num_steps, 1)
        check_count("patience", patience, 1)
        check_count("max_num_untracked", max_num_untracked, 1)
        if (patience is None) != (least is None) or not (least is None or 0 < least <= target):
            raise ValueError(
                f"Expected `least` above 0 and up to `target`, {target}, together with `patience`, or "
                f"neither; got {least} and {patience}."
            )
        self.target = float(target)
        self.max_num_steps = max_num_steps
        self.patience, self.least = patience, least
        self.max_num_untracked = max_num_untracked

    def is_over(self, num_steps: int, ess: float) -> bool:
        """Whether the target is reached, ``least`` after ``patience`` steps, or ``max_num_steps`` taken."""
        is_eased = self.patience is not None and num_steps >= self.patience
        return ess >= self.target or (is_eased and self.is_met(ess)) or num_steps >= self.max_num_steps

    def after(self, num_untracked: int) -> ESSStageRule:
        """Return the rule for a stage that follows so many in a row that ran out of steps."""
        if self.max_num_untracked is None or num_untracked < self.max_num_untracked:
            return self
        shorter = copy.copy(self)
        shorter.max_num_steps = math.ceil(self.max_num_steps / 4)
        return shorter

    def is_met(self, ess: float) -> bool:
        """Whether the target is reached, or ``least`` where there is one."""
        return ess >= (self.target if self.least is None else self.least)
