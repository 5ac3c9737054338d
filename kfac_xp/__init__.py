"""K-FAC curvature for plain arrays: NumPy, CuPy, PyTorch and JAX from one source."""

from kfac_xp import _source_tree  # noqa: F401  (first: it makes kfac_xp.kernels importable)
from kfac_xp.averages import MovingAverage
from kfac_xp.backend import explain, use_backend
from kfac_xp.curvature_products import CurvatureMatrixVectorProductComputer
from kfac_xp.damping import (
    LevenbergMarquardt,
    compute_pi_adjusted_damping,
    compute_pi_tracenorm,
    normalize_damping,
)
from kfac_xp.estimator import FisherEstimator, make_fisher_estimator
from kfac_xp.fisher_blocks import (
    ConvDiagonalFB,
    ConvKFCBasicFB,
    DiagonalFB,
    FisherBlock,
    FullyConnectedDiagonalFB,
    FullyConnectedKFACBasicFB,
    KroneckerProductFB,
)
from kfac_xp.fisher_factors import (
    ConvDiagonalFactor,
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
    DenseSquareMatrixFactor,
    DiagonalFactor,
    FisherFactor,
    FullyConnectedDiagonalFactor,
    FullyConnectedKroneckerFactor,
    InverseProvidingFactor,
)
from kfac_xp.geometry import ConvGeometry
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.linalg import append_homog, compute_cov
from kfac_xp.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    LossFunction,
    MultiBernoulliNegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
)
from kfac_xp.operators import Diag, FullMatrix, KroneckerProduct, LinearOperator
from kfac_xp.ops import conv_squared_outer, extract_patches, squared_outer
from kfac_xp.optimizer import KfacOptimizer, PeriodicInvCovUpdateKfacOpt, StepInfo
from kfac_xp.options import FactorOptions
from kfac_xp.params import (
    column_to_tensors,
    flat_to_vectors,
    layer_params_to_mat2d,
    mat2d_to_layer_params,
    tensors_to_column,
    vectors_to_flat,
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
    "KroneckerProduct",
    "LevenbergMarquardt",
    "LinearOperator",
    "MovingAverage",
    "column_to_tensors",
    "compute_pi_adjusted_damping",
    "compute_pi_tracenorm",
    "flat_to_vectors",
    "layer_params_to_mat2d",
    "mat2d_to_layer_params",
    "normalize_damping",
    "tensors_to_column",
    "vectors_to_flat",
    # factors
    "ConvDiagonalFactor",
    "ConvInputKroneckerFactor",
    "ConvOutputKroneckerFactor",
    "DenseSquareMatrixFactor",
    "DiagonalFactor",
    "FisherFactor",
    "FullyConnectedDiagonalFactor",
    "FullyConnectedKroneckerFactor",
    "InverseProvidingFactor",
    # blocks
    "ConvDiagonalFB",
    "ConvKFCBasicFB",
    "DiagonalFB",
    "FisherBlock",
    "FullyConnectedDiagonalFB",
    "FullyConnectedKFACBasicFB",
    "KroneckerProductFB",
    # losses
    "CategoricalLogitsNegativeLogProbLoss",
    "LossFunction",
    "MultiBernoulliNegativeLogProbLoss",
    "NormalMeanNegativeLogProbLoss",
    # whole models
    "CurvatureMatrixVectorProductComputer",
    "FisherEstimator",
    "KfacOptimizer",
    "LayerCollection",
    "PeriodicInvCovUpdateKfacOpt",
    "StepInfo",
    "make_fisher_estimator",
    # state
    "flatten_state",
    "load_state",
    "save_state",
    "unflatten_state",
]
