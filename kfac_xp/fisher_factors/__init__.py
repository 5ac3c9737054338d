"""Running second moments of layers: the factors that Fisher blocks are made of."""

from kfac_xp.fisher_factors.base import FisherFactor, refresh_factors
from kfac_xp.fisher_factors.convolution import (
    ConvDiagonalFactor,
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
)
from kfac_xp.fisher_factors.forms import (
    DenseSquareMatrixFactor,
    DiagonalFactor,
    InverseProvidingFactor,
)
from kfac_xp.fisher_factors.fully_connected import (
    FullyConnectedDiagonalFactor,
    FullyConnectedKroneckerFactor,
)

__all__ = [
    "ConvDiagonalFactor",
    "ConvInputKroneckerFactor",
    "ConvOutputKroneckerFactor",
    "DenseSquareMatrixFactor",
    "DiagonalFactor",
    "FisherFactor",
    "FullyConnectedDiagonalFactor",
    "FullyConnectedKroneckerFactor",
    "InverseProvidingFactor",
    "refresh_factors",
]
