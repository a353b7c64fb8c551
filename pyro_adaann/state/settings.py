"""The settings of a fit, which never change and may be shared."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pyro_adaann.annealing.ladder import Ladder
from pyro_adaann.annealing.paths import Path
from pyro_adaann.annealing.schedules import AnnealingSchedule
from pyro_adaann.annealing.stage_rules import StageRule
from pyro_adaann.checks import check_count, kind_of
from pyro_adaann.state.budget import StepPlan

__all__ = ["FitSettings"]


@dataclass(frozen=True)
class FitSettings:
    """How a fit anneals; the fields are arguments of `AdaAnnSVI`, which describes them.

    :raises ValueError: if one is out of range, or two do not go together.
    """

    schedule: AnnealingSchedule
    path: Path
    stage_rule: StageRule | None
    ladder: Ladder | None
    num_initial_steps: int
    num_steps_per_stage: int
    num_final_steps: int
    num_variance_samples: int | None
    lr_schedule: str
    max_num_final_steps: int | None = None

    def __post_init__(self) -> None:
        _check_kind("schedule", self.schedule, AnnealingSchedule, "SequenceSchedule for a list of numbers")
        _check_kind("stage_rule", self.stage_rule, StageRule | None, "ESSStageRule(0.3)")
        _check_kind("ladder", self.ladder, Ladder | None, "Ladder()")
        check_count("num_initial_steps", self.num_initial_steps, 0)
        check_count("num_steps_per_stage", self.num_steps_per_stage, 1)
        check_count("num_final_steps", self.num_final_steps, 1)
        check_count("max_num_final_steps", self.max_num_final_steps, self.num_final_steps)
        check_count("num_variance_samples", self.num_variance_samples, 2)
        if self.lr_schedule not in ("final", "always", "never"):
            raise ValueError(
                f"Expected `lr_schedule` to be 'final', 'always' or 'never'; got {self.lr_schedule!r}."
            )
        if self.path.entropy != 1:
            self._check_kl_warmup()

    def _check_kl_warmup(self) -> None:
        name = self.path.name
        if self.schedule.needs_log_factor:
            raise ValueError(
                f"Expected a fixed schedule on path {name!r}; got {type(self.schedule).__name__}. Its steps "
                f"are equal in the KL divergence between tempered posteriors of a given model, and KL "
                f"warm-up is for a model that is still being learned. Use LinearSchedule, CosineSchedule or "
                f"SequenceSchedule."
            )
        for what, part in (("stage rule", self.stage_rule), ("ladder", self.ladder)):
            if part is not None:
                raise ValueError(
                    f"Expected a path of tempered posteriors with a {what}; got {name!r}, on which the "
                    f"model's own parameters are learned. Leave the {what} out."
                )

    @property
    def plan(self) -> StepPlan:
        """How many steps the stages have."""
        numbers = self.num_initial_steps, self.num_steps_per_stage, self.num_final_steps
        return StepPlan(*numbers, max_num_final=self.max_num_final_steps)

    def num_recycled_draws(self, num_particles: int) -> int:
        """Return of how many training draws schedule and stage rule want the log factors.

        :param num_particles: draws of a step.
        """
        is_asked = self.schedule.needs_log_factor and self.num_variance_samples is None
        if self.stage_rule is None and not is_asked:
            return 0
        return max(self.num_steps_per_stage * num_particles, 100 if self.stage_rule is None else 500)

    def describe(self) -> dict[str, str]:
        """Return the settings as text, by name, for a checkpoint."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}


def _check_kind(name: str, value: Any, kind: Any, example: str) -> None:
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", str(kind).split(" | ")[0].rsplit(".", 1)[-1])
        article = "an" if expected[0] in "AEIOU" else "a"
        raise ValueError(
            f"Expected `{name}` to be {article} {expected}; got {kind_of(value)}. Use for example {example}."
        )
