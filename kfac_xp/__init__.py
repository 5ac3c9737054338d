"""K-FAC curvature for plain arrays."""

from kfac_xp import _source_tree  # noqa: F401  (first: it makes kfac_xp.kernels importable)
from kfac_xp.backend import explain, use_backend
from kfac_xp.geometry import ConvGeometry
from kfac_xp.ops import conv_squared_outer, extract_patches, squared_outer

__version__ = "0.1.0"
__all__ = [
    "ConvGeometry",
    "conv_squared_outer",
    "explain",
    "extract_patches",
    "squared_outer",
    "use_backend",
]
