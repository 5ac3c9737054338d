"""K-FAC curvature for plain arrays: NumPy, CuPy, PyTorch and JAX from one source."""

from kfac_xp import _source_tree  # noqa: F401  (first: it makes kfac_xp.kernels importable)
from kfac_xp.averages import MovingAverage
from kfac_xp.backend import explain, use_backend
from kfac_xp.damping import (
    compute_pi_adjusted_damping,
    compute_pi_tracenorm,
    normalize_damping,
)
from kfac_xp.estimator import FisherEstimator
from kfac_xp.fisher_blocks import (
    ConvDiagonalFB,
    ConvKFCBasicFB,
    ConvKFCBasicMultiIndepFB,
    DepthwiseConvDiagonalFB,
    DepthwiseConvKFCBasicFB,
    DiagonalFB,
    FisherBlock,
    FullFB,
    FullyConnectedDiagonalFB,
    FullyConnectedKFACBasicFB,
    FullyConnectedMultiIndepFB,
    FullyConnectedSeriesFB,
    InputOutputMultiTower,
    InputOutputMultiTowerMultiUse,
    KroneckerProductFB,
    NaiveDiagonalFB,
    NaiveFullFB,
    ScaleAndShiftDiagonalFB,
    ScaleAndShiftFullFB,
    SeriesFBApproximation,
    conv2d_filter_to_depthwise_conv2d_filter,
    depthwise_conv2d_filter_to_conv2d_filter,
)
from kfac_xp.fisher_factors import (
    ConvDiagonalFactor,
    ConvInputKroneckerFactor,
    ConvInputMultiKF,
    ConvInputSUAKroneckerFactor,
    ConvOutputKroneckerFactor,
    ConvOutputMultiKF,
    DenseSquareMatrixFactor,
    DiagonalFactor,
    DiagonalKroneckerFactor,
    DiagonalMultiKF,
    FisherFactor,
    FullyConnectedDiagonalFactor,
    FullyConnectedKroneckerFactor,
    FullyConnectedMultiKF,
    InverseProvidingFactor,
    NaiveDiagonalFactor,
    NaiveFullFactor,
    ScaleAndShiftDiagonalFactor,
    ScaleAndShiftFactor,
    ScaleAndShiftFullFactor,
)
from kfac_xp.geometry import ConvGeometry
from kfac_xp.layer_collection import (
    LayerCollection,
    RegistrationReport,
    get_default_layer_collection,
    set_default_layer_collection,
)
from kfac_xp.linalg import append_homog, compute_cov
from kfac_xp.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    LossFunction,
    MultiBernoulliNegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
)
from kfac_xp.operators import Diag, FullMatrix, KroneckerProduct, LinearOperator
from kfac_xp.ops import conv_squared_outer, extract_patches, squared_outer
from kfac_xp.optimizer import KfacOptimizer, StepInfo
from kfac_xp.options import FactorOptions
from kfac_xp.params import (
    IndexedSlices,
    column_to_tensors,
    layer_params_to_mat2d,
    mat2d_to_layer_params,
    matmul_diag_sparse,
    matmul_sparse_dense,
    tensors_to_column,
)
from kfac_xp.state import flatten_state, load_state, save_state, unflatten_state

__version__ = "0.1.0"

__all__ = [
    # arrays and ops
    "ConvGeometry",
    "append_homog",
    "compute_cov",
    "conv_squared_outer",
    "explain",
    "extract_patches",
    "squared_outer",
    "use_backend",
    # operators, damping, averages, parameters
    "Diag",
    "FactorOptions",
    "FullMatrix",
    "IndexedSlices",
    "KroneckerProduct",
    "LinearOperator",
    "MovingAverage",
    "column_to_tensors",
    "compute_pi_adjusted_damping",
    "compute_pi_tracenorm",
    "layer_params_to_mat2d",
    "mat2d_to_layer_params",
    "matmul_diag_sparse",
    "matmul_sparse_dense",
    "normalize_damping",
    "tensors_to_column",
    # factors
    "ConvDiagonalFactor",
    "ConvInputKroneckerFactor",
    "ConvInputMultiKF",
    "ConvInputSUAKroneckerFactor",
    "ConvOutputKroneckerFactor",
    "ConvOutputMultiKF",
    "DenseSquareMatrixFactor",
    "DiagonalFactor",
    "DiagonalKroneckerFactor",
    "DiagonalMultiKF",
    "FisherFactor",
    "FullyConnectedDiagonalFactor",
    "FullyConnectedKroneckerFactor",
    "FullyConnectedMultiKF",
    "InverseProvidingFactor",
    "NaiveDiagonalFactor",
    "NaiveFullFactor",
    "ScaleAndShiftDiagonalFactor",
    "ScaleAndShiftFactor",
    "ScaleAndShiftFullFactor",
    # blocks
    "ConvDiagonalFB",
    "ConvKFCBasicFB",
    "ConvKFCBasicMultiIndepFB",
    "DepthwiseConvDiagonalFB",
    "DepthwiseConvKFCBasicFB",
    "DiagonalFB",
    "FisherBlock",
    "FullFB",
    "FullyConnectedDiagonalFB",
    "FullyConnectedKFACBasicFB",
    "FullyConnectedMultiIndepFB",
    "FullyConnectedSeriesFB",
    "InputOutputMultiTower",
    "InputOutputMultiTowerMultiUse",
    "KroneckerProductFB",
    "NaiveDiagonalFB",
    "NaiveFullFB",
    "ScaleAndShiftDiagonalFB",
    "ScaleAndShiftFullFB",
    "SeriesFBApproximation",
    "conv2d_filter_to_depthwise_conv2d_filter",
    "depthwise_conv2d_filter_to_conv2d_filter",
    # losses
    "CategoricalLogitsNegativeLogProbLoss",
    "LossFunction",
    "MultiBernoulliNegativeLogProbLoss",
    "NormalMeanNegativeLogProbLoss",
    # whole models
    "FisherEstimator",
    "KfacOptimizer",
    "LayerCollection",
    "RegistrationReport",
    "StepInfo",
    "get_default_layer_collection",
    "set_default_layer_collection",
    # state
    "flatten_state",
    "load_state",
    "save_state",
    "unflatten_state",
]
