"""Annealed variational inference with normalizing flows for Pyro."""

from pyro_adaann.annealing.cess_schedule import CESSSchedule
from pyro_adaann.annealing.fixed_schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    SequenceSchedule,
)
from pyro_adaann.annealing.history import AnnealingHistory, AnnealingStage, Recovery
from pyro_adaann.annealing.ladder import Ladder
from pyro_adaann.annealing.paths import BRIDGE, JOINT, KL_WARMUP, LIKELIHOOD, Path
from pyro_adaann.annealing.schedules import AdaAnnSchedule, AnnealingSchedule
from pyro_adaann.annealing.stage_rules import ESSStageRule, StageRule
from pyro_adaann.diagnostics.diagnose import diagnose
from pyro_adaann.diagnostics.importance import WeightedDraws, importance_draws
from pyro_adaann.diagnostics.lost_parts import LadderReport, LostPart, find_lost_parts
from pyro_adaann.diagnostics.mixture import mixture_draws
from pyro_adaann.diagnostics.opinion import SecondOpinion, second_opinion
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.export import plots
from pyro_adaann.export.arviz import to_arviz
from pyro_adaann.fitting.fit import fit
from pyro_adaann.fitting.result import FitResult, FitSummary
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.guides.planar import AutoPlanar
from pyro_adaann.guides.realnvp import AutoRealNVP
from pyro_adaann.guides.spline import AutoSpline
from pyro_adaann.guides.zuko import AutoZuko
from pyro_adaann.natural import natural_svi
from pyro_adaann.objectives.mixed_kl import TraceMixedKL_ELBO
from pyro_adaann.objectives.one_by_one import one_by_one
from pyro_adaann.objectives.tempered_elbo import TemperedTrace_ELBO
from pyro_adaann.sampling.calibration import Calibration, simulation_based_calibration
from pyro_adaann.sampling.polish import GuideKernel, PolishedChains, polish
from pyro_adaann.sampling.result import SMCResult
from pyro_adaann.sampling.smc import AnnealedSMC
from pyro_adaann.state.rungs import Rung
from pyro_adaann.steps.natural import NaturalStep
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.version import __version__
from pyro_adaann.weights import effective_sample_size, pareto_smooth, resample, weighted_mean

__all__ = [
    "BRIDGE",
    "JOINT",
    "KL_WARMUP",
    "LIKELIHOOD",
    "AdaAnnSVI",
    "AdaAnnSchedule",
    "AnnealedSMC",
    "AnnealingHistory",
    "AnnealingSchedule",
    "AnnealingStage",
    "AutoFlow",
    "AutoPlanar",
    "AutoRealNVP",
    "AutoSpline",
    "AutoZuko",
    "CESSSchedule",
    "Calibration",
    "ConstantSchedule",
    "CosineSchedule",
    "Diagnosis",
    "ESSStageRule",
    "FitResult",
    "FitSummary",
    "GuideKernel",
    "Ladder",
    "LadderReport",
    "LinearSchedule",
    "LostPart",
    "NaturalStep",
    "Path",
    "PolishedChains",
    "Recovery",
    "Rung",
    "SMCResult",
    "SecondOpinion",
    "SequenceSchedule",
    "StageRule",
    "TemperedTrace_ELBO",
    "TraceMixedKL_ELBO",
    "WeightedDraws",
    "__version__",
    "diagnose",
    "effective_sample_size",
    "find_lost_parts",
    "fit",
    "importance_draws",
    "mixture_draws",
    "natural_svi",
    "one_by_one",
    "pareto_smooth",
    "plots",
    "polish",
    "resample",
    "second_opinion",
    "simulation_based_calibration",
    "to_arviz",
    "weighted_mean",
]
