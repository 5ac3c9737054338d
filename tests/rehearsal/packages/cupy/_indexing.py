"""What an index means: read in cupy/_core/_routines_indexing.pyx.

Integer arrays wrap around instead of raising. Lists and NumPy arrays are moved to the device. A
Boolean mask is counted on the host.
"""

import numpy as np


def index_of(array, key):
    """A key as NumPy takes it, and whether the result is a copy."""
    from cupy._array import new

    keys = key if isinstance(key, tuple) else (key,)
    found, axis, is_advanced = [], 0, False
    used_axes = sum(_axes_of(k) for k in keys)
    for k in keys:
        if isinstance(k, (list, np.ndarray)):  # moved to the device by CuPy
            k = np.asarray(k, dtype=None if np.size(k) else np.int32)
        elif isinstance(k, type(array)):
            k = k._a
        if isinstance(k, np.ndarray):
            is_advanced = True
            if k.dtype.kind == "b":
                int(new(np.asarray(np.count_nonzero(k))))  # the host waits for the shape
            elif k.dtype.kind in "iu":
                if array.ndim == 0:
                    raise IndexError("too many indices for array")
                if array.shape[axis] == 0 and k.size:
                    raise IndexError("cannot do a non-empty take from an empty axes.")
                k = np.asarray(k % array.shape[axis] if k.size else k)
            else:
                raise IndexError("arrays used as indices must be of integer or boolean type.")
            axis += k.ndim if k.dtype.kind == "b" else 1
        elif k is Ellipsis:
            axis += array.ndim - used_axes
        elif isinstance(k, slice):
            axis += 1
        elif k is not None:
            axis += 1
            k = int(k)
        found.append(k)
    return tuple(found), is_advanced


def _axes_of(key):
    if key is None or key is Ellipsis:
        return 0
    dtype = getattr(key, "dtype", None)
    return key.ndim if dtype is not None and dtype.kind == "b" else 1
