"""What power, inverse and product mean for a stored covariance: dense or diagonal.

The contract is *register, refresh, serve*: what will be needed is registered first, computed when
`refresh` runs, and served from storage, possibly stale, until the next refresh.
"""

from kfac_xp.representations.attempts import RUNGS, Decomposition
from kfac_xp.representations.base import Representation
from kfac_xp.representations.dense import Dense
from kfac_xp.representations.diagonal import Diagonal
from kfac_xp.representations.ladder import refresh
from kfac_xp.representations.lagged import Lagged
from kfac_xp.representations.low_rank import LowRank
from kfac_xp.representations.requests import (
    DampingKey,
    Kind,
    PackagedFunc,
    PowerCache,
    Request,
    read_damping,
    require_damping,
)
from kfac_xp.representations.spatially_uncorrelated import SpatiallyUncorrelated
from kfac_xp.representations.trace_normalized import TraceNormalized

__all__ = [
    "RUNGS",
    "DampingKey",
    "Decomposition",
    "Dense",
    "Diagonal",
    "Kind",
    "Lagged",
    "LowRank",
    "PackagedFunc",
    "PowerCache",
    "Representation",
    "Request",
    "SpatiallyUncorrelated",
    "TraceNormalized",
    "read_damping",
    "refresh",
    "require_damping",
]
