"""Which layers and losses a model has, by name, and how each layer's Fisher is approximated."""

from kfac_xp.layer_collection.approximations import APPROXIMATIONS
from kfac_xp.layer_collection.collection import (
    LayerCollection,
    get_default_layer_collection,
    set_default_layer_collection,
)
from kfac_xp.layer_collection.curvature_report import (
    CurvatureReport,
    FactorReport,
    LayerReport,
    make_curvature_report,
)
from kfac_xp.layer_collection.losses import LossFactory, RegisteredLoss
from kfac_xp.layer_collection.report import RegisteredLayer, RegistrationReport

__all__ = [
    "APPROXIMATIONS",
    "CurvatureReport",
    "FactorReport",
    "LayerCollection",
    "LayerReport",
    "LossFactory",
    "RegisteredLayer",
    "RegisteredLoss",
    "RegistrationReport",
    "get_default_layer_collection",
    "make_curvature_report",
    "set_default_layer_collection",
]
