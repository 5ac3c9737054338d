"""The curvature of a whole model: statistics of every layer, and products block by block."""

from kfac_xp.estimator.factory import make_fisher_estimator
from kfac_xp.estimator.fisher_estimator import FisherEstimator
from kfac_xp.estimator.modes import ESTIMATION_MODES, Source

__all__ = ["ESTIMATION_MODES", "FisherEstimator", "Source", "make_fisher_estimator"]
