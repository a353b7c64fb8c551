"""Annealed variational inference with normalizing flows for Pyro."""

from pyro_adaann.fixed_schedules import ConstantSchedule, CosineSchedule, LinearSchedule, SequenceSchedule
from pyro_adaann.guides import AutoFlow, AutoPlanar, AutoRealNVP
from pyro_adaann.results import AnnealingHistory, AnnealingStage
from pyro_adaann.schedules import AdaAnnSchedule, AnnealingSchedule
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
    "ConstantSchedule",
    "CosineSchedule",
    "LinearSchedule",
    "Path",
    "SequenceSchedule",
    "TemperedTrace_ELBO",
    "__version__",
]
