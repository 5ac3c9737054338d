"""The curvature of a whole model: statistics of every layer, and products block by block."""

from kfac_xp.estimator.batch import Batch
from kfac_xp.estimator.fisher_estimator import ESTIMATION_MODES, FisherEstimator

__all__ = ["ESTIMATION_MODES", "Batch", "FisherEstimator"]
