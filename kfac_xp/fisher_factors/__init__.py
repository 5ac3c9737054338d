"""Running second moments of layers: the factors that Fisher blocks are made of."""

from kfac_xp.fisher_factors.accounts import (
    Memory,
    facts_of_factors,
    memory_of,
    num_updates,
    staleness,
)
from kfac_xp.fisher_factors.base import FisherFactor
from kfac_xp.fisher_factors.convolution import (
    ConvDiagonalFactor,
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
)
from kfac_xp.fisher_factors.embedding_rotated import EmbeddingRotatedFactor
from kfac_xp.fisher_factors.forms import (
    DenseSquareMatrixFactor,
    DiagonalFactor,
    InverseProvidingFactor,
    LowRankFactor,
    require_rank,
)
from kfac_xp.fisher_factors.fully_connected import (
    DiagonalKroneckerFactor,
    FullyConnectedDiagonalFactor,
    FullyConnectedKroneckerFactor,
)
from kfac_xp.fisher_factors.generic import (
    NaiveDiagonalFactor,
    NaiveFullFactor,
    NaiveLowRankFactor,
    params_sources,
)
from kfac_xp.fisher_factors.groups import moments_of_groups
from kfac_xp.fisher_factors.low_rank import ConvLowRankFactor, FullyConnectedLowRankFactor
from kfac_xp.fisher_factors.multi_use import (
    ConvInputMultiKF,
    ConvOutputMultiKF,
    DiagonalMultiKF,
    FullyConnectedMultiKF,
)
from kfac_xp.fisher_factors.refreshing import follow, refresh_factors, refresh_powers
from kfac_xp.fisher_factors.rotated import (
    ConvGroupedRotatedFactor,
    ConvRotatedFactor,
    FullyConnectedRotatedFactor,
    RotatedDiagonalFactor,
    Side,
    SideOfGroups,
)
from kfac_xp.fisher_factors.scale_and_shift import (
    ScaleAndShiftDiagonalFactor,
    ScaleAndShiftFactor,
    ScaleAndShiftFullFactor,
    ScaleAndShiftLowRankFactor,
)
from kfac_xp.fisher_factors.spatially_uncorrelated import ConvInputSUAKroneckerFactor
from kfac_xp.fisher_factors.tensor_normal import (
    ConvTensorNormalFactor,
    FullyConnectedTensorNormalFactor,
)

__all__ = [
    "ConvDiagonalFactor",
    "ConvGroupedRotatedFactor",
    "ConvInputKroneckerFactor",
    "ConvInputMultiKF",
    "ConvInputSUAKroneckerFactor",
    "ConvLowRankFactor",
    "ConvOutputKroneckerFactor",
    "ConvOutputMultiKF",
    "ConvRotatedFactor",
    "ConvTensorNormalFactor",
    "DenseSquareMatrixFactor",
    "DiagonalFactor",
    "DiagonalKroneckerFactor",
    "DiagonalMultiKF",
    "EmbeddingRotatedFactor",
    "FisherFactor",
    "FullyConnectedDiagonalFactor",
    "FullyConnectedKroneckerFactor",
    "FullyConnectedLowRankFactor",
    "FullyConnectedMultiKF",
    "FullyConnectedRotatedFactor",
    "FullyConnectedTensorNormalFactor",
    "InverseProvidingFactor",
    "LowRankFactor",
    "Memory",
    "NaiveDiagonalFactor",
    "NaiveFullFactor",
    "NaiveLowRankFactor",
    "RotatedDiagonalFactor",
    "ScaleAndShiftDiagonalFactor",
    "ScaleAndShiftFactor",
    "ScaleAndShiftFullFactor",
    "ScaleAndShiftLowRankFactor",
    "moments_of_groups",
    "Side",
    "SideOfGroups",
    "params_sources",
    "facts_of_factors",
    "follow",
    "memory_of",
    "num_updates",
    "refresh_factors",
    "refresh_powers",
    "require_rank",
    "staleness",
]
