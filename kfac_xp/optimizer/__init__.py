"""Training with K-FAC: gradients preconditioned by the inverse of the approximate Fisher."""

from kfac_xp.optimizer.info import StepInfo
from kfac_xp.optimizer.kfac_optimizer import KfacOptimizer
from kfac_xp.optimizer.periodic import PeriodicInvCovUpdateKfacOpt
from kfac_xp.optimizer.settings import MOMENTUM_TYPES, Period

__all__ = [
    "MOMENTUM_TYPES",
    "KfacOptimizer",
    "Period",
    "PeriodicInvCovUpdateKfacOpt",
    "StepInfo",
]
