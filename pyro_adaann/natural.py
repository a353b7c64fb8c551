"""`natural_svi`: an annealed fit by natural-gradient steps, with matching settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro_adaann.annealing.cess_schedule import CESSSchedule
from pyro_adaann.annealing.ladder import Ladder
from pyro_adaann.annealing.stage_rules import ESSStageRule
from pyro_adaann.guides.continuous import continuous_part
from pyro_adaann.guides.spline import AutoSpline
from pyro_adaann.steps.natural import NaturalStep
from pyro_adaann.svi import AdaAnnSVI

__all__ = ["NUM_BEHIND", "NUM_FINAL", "natural_svi", "schedule_from"]

#: Steps at inverse temperature 1, and the most of them while the loss falls. After 40 and 70 steps the
#: effective sample size of a funnel in 10 dimensions was 84 and 97 %, of the eight schools 66 and 95 %.
NUM_FINAL, _MAX_NUM_FINAL = 60, 180
#: After so many stages in a row that ran out of steps the guide has fallen behind.
NUM_BEHIND = 8


def natural_svi(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    *,
    num_particles: int = 500,
    max_kl: float = 0.02,
    damping: float = 0.1,
    max_plate_nesting: float = math.inf,
    num_final_steps: int | None = None,
    **kwargs: Any,
) -> AdaAnnSVI:
    """Return an `AdaAnnSVI` that fits every tempered density closely, by natural-gradient steps.

    It anneals from the base of the guide (path ``"bridge"``) by :class:`~pyro_adaann.NaturalStep`. A stage
    ends when the effective sample size of the guide's draws is four fifths of their number, after four steps
    one half, or with 20 steps, 5 after eight such stages in a row
    (:class:`~pyro_adaann.ESSStageRule`); the next inverse temperature keeps a conditional
    effective sample size of 97 % (:class:`~pyro_adaann.CESSSchedule`); a
    :class:`~pyro_adaann.Ladder` records the guide for :func:`diagnose`. A fit takes one to three hundred
    steps. It is meant for flow guides whose base covers the modes.

    :param model: a Pyro model that vectorizes (or :func:`one_by_one` of one that does not), has no parameters
        of its own and does not subsample.
    :param guide: a guide of this package, by default an :class:`~pyro_adaann.AutoSpline` whose base comes
        from draws of the prior, ``svi.guide``. For a guide of another package pass ``path="joint"``.
    :param num_particles: draws of a step. A step evaluates the model on two or more such batches.
    :param max_kl: bound on the divergence of one step, in nats.
    :param damping: damping of the first step.
    :param max_plate_nesting: number of nested plates in the model; guessed if not given.
    :param num_final_steps: steps at inverse temperature 1; by default 60, up to 180 while the loss falls,
        and 20 where all draws have nearly the same weight.
    :param kwargs: other arguments of `AdaAnnSVI`, which override the settings above.
    :raises ValueError: as :class:`~pyro_adaann.AdaAnnSVI` does.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
        ...     pyro.sample("x", dist.Normal(z**2, 0.5), obs=torch.tensor(4.0))
        >>> pyro.clear_param_store()  # a new fit
        >>> pyro.set_rng_seed(0)
        >>> svi = natural_svi(model)
        >>> history = svi.run(progress_bar=False)
        >>> draws = svi.guide.sample_posterior(1000)["z"]
        >>> 0.4 < float((draws > 0).float().mean()) < 0.6  # both modes, of weight 1/2 each
        True
    """
    settings: dict[str, Any] = {
        "path": "bridge",
        "schedule": schedule_from(1e-8),
        "stage_rule": ESSStageRule(
            0.8, max_num_steps=20, patience=4, least=0.5, max_num_untracked=NUM_BEHIND
        ),
        "ladder": Ladder(),
        "num_initial_steps": 1,
        "num_steps_per_stage": 1,
        **kwargs,
    }
    if guide is None:
        guide = AutoSpline(continuous_part(model), base_loc="prior", base_scale="prior")
    if num_final_steps is None:
        settings = {"num_final_steps": NUM_FINAL, "max_num_final_steps": _MAX_NUM_FINAL, **settings}
    else:
        settings["num_final_steps"] = num_final_steps
    step = NaturalStep(num_particles, max_kl, damping, max_plate_nesting)
    return AdaAnnSVI(model, guide, step, **settings)


def schedule_from(inverse_temperature: float) -> CESSSchedule:
    """Return the schedule of :func:`natural_svi` with another first inverse temperature."""
    return CESSSchedule(0.97, initial_inverse_temperature=inverse_temperature)
