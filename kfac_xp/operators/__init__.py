"""Symmetric curvature matrices in the form in which they are stored, with a common interface."""

from kfac_xp.operators.base import ROUNDING, LinearOperator, Spectrum, without_rounding
from kfac_xp.operators.block_diagonal import BlockDiagonal
from kfac_xp.operators.congruence import Congruence, InverseOf, MinusProduct
from kfac_xp.operators.diagonalized import Diagonalized
from kfac_xp.operators.kronecker import KroneckerEigen, KroneckerProduct
from kfac_xp.operators.low_rank import DiagonalPlusLowRank, LowRankRoot
from kfac_xp.operators.matrix import CurvatureMatrix
from kfac_xp.operators.permuted import Permuted, permuted
from kfac_xp.operators.products import SymmetricProducts
from kfac_xp.operators.scipy_views import scipy_operator
from kfac_xp.operators.spaces import LayerSpace, ModelSpace, VectorSpace
from kfac_xp.operators.stored import Diag, FullMatrix, LinearOperatorDiag, LinearOperatorFullMatrix
from kfac_xp.operators.structured import RankOneUpdate, RepeatedBlock
from kfac_xp.operators.taps import TapBasis, UncorrelatedTaps, spectrum_of_taps

__all__ = [
    "ROUNDING",
    "BlockDiagonal",
    "Congruence",
    "CurvatureMatrix",
    "Diag",
    "DiagonalPlusLowRank",
    "Diagonalized",
    "FullMatrix",
    "InverseOf",
    "KroneckerEigen",
    "KroneckerProduct",
    "LayerSpace",
    "LinearOperator",
    "LinearOperatorDiag",
    "LinearOperatorFullMatrix",
    "LowRankRoot",
    "MinusProduct",
    "ModelSpace",
    "Permuted",
    "RankOneUpdate",
    "RepeatedBlock",
    "Spectrum",
    "SymmetricProducts",
    "TapBasis",
    "UncorrelatedTaps",
    "VectorSpace",
    "permuted",
    "scipy_operator",
    "spectrum_of_taps",
    "without_rounding",
]
