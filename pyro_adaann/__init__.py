"""Annealed variational inference with normalizing flows for Pyro."""

from pyro_adaann.guides import AutoFlow, AutoPlanar, AutoRealNVP
from pyro_adaann.results import AnnealingHistory, AnnealingStage, Recovery
from pyro_adaann.schedules import (
    AdaAnnSchedule,
    AnnealingSchedule,
    ConstantSchedule,
    LinearSchedule,
    SequenceSchedule,
)
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.tempering import BRIDGE, JOINT, LIKELIHOOD, Path, TemperedTrace_ELBO
from pyro_adaann.version import __version__

__all__ = [
    "BRIDGE",
    "JOINT",
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
    "LinearSchedule",
    "Path",
    "Recovery",
    "SequenceSchedule",
    "TemperedTrace_ELBO",
    "__version__",
]
