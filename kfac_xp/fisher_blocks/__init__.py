"""The Fisher of one layer's parameters, in the layer's shapes."""

from kfac_xp.fisher_blocks.base import (
    FisherBlock,
    add_moments,
    average_in,
    blocks_factors,
)
from kfac_xp.fisher_blocks.convolution import ConvDiagonalFB, ConvKFCBasicFB
from kfac_xp.fisher_blocks.diagonal import DiagonalFB
from kfac_xp.fisher_blocks.fully_connected import (
    FullyConnectedDiagonalFB,
    FullyConnectedKFACBasicFB,
)
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB

__all__ = [
    "ConvDiagonalFB",
    "ConvKFCBasicFB",
    "DiagonalFB",
    "FisherBlock",
    "FullyConnectedDiagonalFB",
    "FullyConnectedKFACBasicFB",
    "KroneckerProductFB",
    "add_moments",
    "average_in",
    "blocks_factors",
]
