"""Blocks whose eigenvalues in the Kronecker eigenbasis are measured: EKFAC."""

from kfac_xp.fisher_blocks.eigenvalue_corrected.base import EigenvalueCorrectedFB
from kfac_xp.fisher_blocks.eigenvalue_corrected.convolution import (
    ConvEKFACFB,
    ConvEKFACReduceFB,
    ConvGroupedEKFACFB,
    ConvMultiEKFACFB,
)
from kfac_xp.fisher_blocks.eigenvalue_corrected.dense import (
    FullyConnectedEKFACExpandFB,
    FullyConnectedEKFACFB,
    FullyConnectedEKFACReduceFB,
    FullyConnectedMultiEKFACFB,
)

__all__ = [
    "ConvEKFACFB",
    "ConvEKFACReduceFB",
    "ConvGroupedEKFACFB",
    "ConvMultiEKFACFB",
    "EigenvalueCorrectedFB",
    "FullyConnectedEKFACExpandFB",
    "FullyConnectedEKFACFB",
    "FullyConnectedEKFACReduceFB",
    "FullyConnectedMultiEKFACFB",
]
