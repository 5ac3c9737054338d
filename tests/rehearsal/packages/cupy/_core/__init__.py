"""``cupy._core``: the compute type of float32 products."""

import numpy as np

from cupy._core import _routines_linalg as types
from cupy._signatures import checked

_held = {"e": types.COMPUTE_TYPE_DEFAULT, "f": types.COMPUTE_TYPE_DEFAULT}


@checked("cupy._core", "get_compute_type")
def get_compute_type(dtype):
    """The compute type of products of this dtype."""
    return _held.get(np.dtype(dtype).char, types.COMPUTE_TYPE_DEFAULT)


@checked("cupy._core", "set_compute_type")
def set_compute_type(dtype, compute_type):
    """Change it, for all threads."""
    _held[np.dtype(dtype).char] = compute_type


def rounded(x):
    """Factors of a product as its compute type reads them: TF32 has 10 bits after the point."""
    dtype = getattr(x, "dtype", None)
    if dtype != np.float32 or _held["f"] != types.COMPUTE_TYPE_TF32:
        return x
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
