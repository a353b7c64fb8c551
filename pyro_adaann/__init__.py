"""Annealed variational inference with normalizing flows for Pyro."""

from pyro_adaann import plots
from pyro_adaann.cess_schedule import CESSSchedule
from pyro_adaann.diagnostics import Diagnosis, diagnose
from pyro_adaann.fixed_schedules import ConstantSchedule, CosineSchedule, LinearSchedule, SequenceSchedule
from pyro_adaann.guides import AutoFlow, AutoPlanar, AutoRealNVP
from pyro_adaann.importance import (
    WeightedDraws,
    effective_sample_size,
    importance_draws,
    pareto_smooth,
    resample,
    weighted_mean,
)
from pyro_adaann.io_arviz import to_arviz
from pyro_adaann.ladder import Ladder, Rung
from pyro_adaann.lost_modes import LadderReport, LostMode, find_lost_modes
from pyro_adaann.mixed_kl import TraceMixedKL_ELBO
from pyro_adaann.mixture import mixture_draws
from pyro_adaann.natural_kl import TraceNaturalKL_ELBO
from pyro_adaann.presets import natural_svi
from pyro_adaann.results import AnnealingHistory, AnnealingStage, Recovery
from pyro_adaann.schedules import AdaAnnSchedule, AnnealingSchedule
from pyro_adaann.stage_rules import ESSStageRule, StageRule
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.tempering import BRIDGE, JOINT, KL_WARMUP, LIKELIHOOD, Path, TemperedTrace_ELBO
from pyro_adaann.version import __version__

__all__ = [
    "BRIDGE",
    "JOINT",
    "KL_WARMUP",
    "LIKELIHOOD",
    "AdaAnnSVI",
    "AdaAnnSchedule",
    "AnnealingHistory",
    "AnnealingSchedule",
    "AnnealingStage",
    "AutoFlow",
    "AutoPlanar",
    "AutoRealNVP",
    "CESSSchedule",
    "ConstantSchedule",
    "CosineSchedule",
    "Diagnosis",
    "ESSStageRule",
    "Ladder",
    "LadderReport",
    "LinearSchedule",
    "LostMode",
    "Path",
    "Recovery",
    "Rung",
    "SequenceSchedule",
    "StageRule",
    "TemperedTrace_ELBO",
    "TraceMixedKL_ELBO",
    "TraceNaturalKL_ELBO",
    "WeightedDraws",
    "__version__",
    "diagnose",
    "effective_sample_size",
    "find_lost_modes",
    "importance_draws",
    "mixture_draws",
    "natural_svi",
    "pareto_smooth",
    "plots",
    "resample",
    "to_arviz",
    "weighted_mean",
]
