"""Operations on arrays that kernels may replace: patches, squared outer products, triangles.

Each op is its Array API reference; the registrations beside it name the kernels. Ops return sums
over cases; dividing by the number of cases is the business of ``moments``.
"""

from kfac_xp.ops.patches import (
    extract_convolution_patches,
    extract_image_patches,
    extract_patches,
    extract_pointwise_conv2d_patches,
    require_images,
)
from kfac_xp.ops.sharing import (
    extract_transposed_patches,
    mean_patches,
    spread_images,
    turned_round,
)
from kfac_xp.ops.squared_outer import conv_squared_outer, squared_outer
from kfac_xp.ops.triangles import pack_symmetric, unpack_symmetric

__all__ = [
    "conv_squared_outer",
    "extract_convolution_patches",
    "extract_image_patches",
    "extract_patches",
    "extract_pointwise_conv2d_patches",
    "extract_transposed_patches",
    "mean_patches",
    "pack_symmetric",
    "require_images",
    "spread_images",
    "squared_outer",
    "turned_round",
    "unpack_symmetric",
]
