"""The Fisher of one layer's parameters, in the layer's shapes."""

from kfac_xp.fisher_blocks.base import (
    FisherBlock,
    add_moments,
    average_in,
    blocks_factors,
)
from kfac_xp.fisher_blocks.case_gradients import ConvDiagonalFB, ConvLowRankFB
from kfac_xp.fisher_blocks.convolution import ConvKFCBasicFB
from kfac_xp.fisher_blocks.depthwise import (
    DepthwiseConvDiagonalFB,
    DepthwiseConvKFCBasicFB,
    conv2d_filter_to_depthwise_conv2d_filter,
    depthwise_conv2d_filter_to_conv2d_filter,
)
from kfac_xp.fisher_blocks.diagonal import DiagonalFB, LowRankFB
from kfac_xp.fisher_blocks.eigenvalue_corrected import (
    ConvEKFACFB,
    ConvEKFACReduceFB,
    ConvGroupedEKFACFB,
    ConvMultiEKFACFB,
    EigenvalueCorrectedFB,
    FullyConnectedEKFACExpandFB,
    FullyConnectedEKFACFB,
    FullyConnectedEKFACReduceFB,
    FullyConnectedMultiEKFACFB,
)
from kfac_xp.fisher_blocks.full import FullFB
from kfac_xp.fisher_blocks.fully_connected import (
    FullyConnectedDiagonalFB,
    FullyConnectedKFACBasicFB,
    FullyConnectedLowRankFB,
)
from kfac_xp.fisher_blocks.generic import NaiveDiagonalFB, NaiveFullFB, NaiveLowRankFB
from kfac_xp.fisher_blocks.grouped import ConvGroupedKFCFB
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB
from kfac_xp.fisher_blocks.multi_use import (
    ConvKFCBasicMultiIndepFB,
    FullyConnectedMultiIndepFB,
)
from kfac_xp.fisher_blocks.scale_and_shift import (
    ScaleAndShiftDiagonalFB,
    ScaleAndShiftFullFB,
    ScaleAndShiftLowRankFB,
)
from kfac_xp.fisher_blocks.series import FullyConnectedSeriesFB, SeriesFBApproximation
from kfac_xp.fisher_blocks.tensor_normal import (
    ConvGroupedTNTFB,
    ConvMultiTNTFB,
    ConvTNTFB,
    FullyConnectedMultiTNTFB,
    FullyConnectedTNTFB,
    TensorNormalFB,
)
from kfac_xp.fisher_blocks.towers import InputOutputMultiTower, InputOutputMultiTowerMultiUse
from kfac_xp.fisher_blocks.weight_sharing import (
    ConvKFACReduceFB,
    FullyConnectedKFACExpandFB,
    FullyConnectedKFACReduceFB,
)

__all__ = [
    "ConvDiagonalFB",
    "ConvGroupedEKFACFB",
    "ConvGroupedKFCFB",
    "ConvGroupedTNTFB",
    "ConvKFACReduceFB",
    "ConvEKFACFB",
    "ConvEKFACReduceFB",
    "ConvKFCBasicFB",
    "ConvKFCBasicMultiIndepFB",
    "ConvMultiEKFACFB",
    "ConvMultiTNTFB",
    "ConvLowRankFB",
    "ConvTNTFB",
    "DepthwiseConvDiagonalFB",
    "DepthwiseConvKFCBasicFB",
    "DiagonalFB",
    "EigenvalueCorrectedFB",
    "FisherBlock",
    "FullFB",
    "FullyConnectedDiagonalFB",
    "FullyConnectedEKFACExpandFB",
    "FullyConnectedEKFACFB",
    "FullyConnectedEKFACReduceFB",
    "FullyConnectedKFACBasicFB",
    "FullyConnectedKFACExpandFB",
    "FullyConnectedKFACReduceFB",
    "FullyConnectedMultiEKFACFB",
    "FullyConnectedLowRankFB",
    "FullyConnectedMultiIndepFB",
    "FullyConnectedMultiTNTFB",
    "FullyConnectedSeriesFB",
    "FullyConnectedTNTFB",
    "InputOutputMultiTower",
    "InputOutputMultiTowerMultiUse",
    "KroneckerProductFB",
    "LowRankFB",
    "NaiveDiagonalFB",
    "NaiveFullFB",
    "NaiveLowRankFB",
    "ScaleAndShiftDiagonalFB",
    "ScaleAndShiftFullFB",
    "ScaleAndShiftLowRankFB",
    "SeriesFBApproximation",
    "TensorNormalFB",
    "add_moments",
    "average_in",
    "blocks_factors",
    "conv2d_filter_to_depthwise_conv2d_filter",
    "depthwise_conv2d_filter_to_conv2d_filter",
]
