"""One batch of a linearised model: its losses, and the cotangents that are sent through it."""

from kfac_xp.linearized_batch.batch import LinearizedBatch, PerLoss, require_layers
from kfac_xp.linearized_batch.loss_methods import NEEDS, Matrix

__all__ = ["NEEDS", "LinearizedBatch", "Matrix", "PerLoss", "require_layers"]
