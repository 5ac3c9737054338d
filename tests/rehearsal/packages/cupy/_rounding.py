"""A device rounds otherwise than the host: in sums by their order, in functions in the last bit.

As on a device the same arguments give the same result. What is exact there is exact here: single
additions, products, quotients and roots, sums of integers, functions whose values are integers.
Vectors that are determined up to their sign come with another.
"""

import functools

import numpy as np

# Functions of CUDA that are not rounded correctly: their errors are 1 or 2 units in the last place.
FUNCTIONS = {"exp", "expm1", "log", "log1p", "log2", "sin", "cos", "sinh", "cosh", "tanh", "power"}


def matmul(x, y, **options):
    """Products whose inner sums run backwards; no product takes NumPy's way to a symmetric one."""
    inner = -2 if y.ndim > 1 else -1
    return np.matmul(x[..., ::-1].copy(), np.flip(y, inner).copy(), **options)


def tensordot(x, y, axes):
    """See `matmul`."""
    if isinstance(axes, int):
        pairs = [(x.ndim - axes + i, i) for i in range(axes)]
    else:
        pairs = list(zip(*(np.atleast_1d(a).tolist() for a in axes), strict=True))
    for i, j in pairs:
        x, y = np.flip(x, i), np.flip(y, j)
    return np.tensordot(x, y, axes)


def backwards(function):
    """A reduction that begins at the other end."""

    @functools.wraps(function)
    def reduced(a, axis=None, *args, **kwargs):
        return function(np.flip(a, axis), axis, *args, **kwargs)

    return reduced


def nudged(values):
    """Every other number that is no integer, moved to its neighbour."""
    values = np.asarray(values)
    if values.dtype.kind != "f":
        return values
    bits = np.ascontiguousarray(values).view(f"u{values.itemsize}").reshape(values.shape)
    moves = (bits % 2 == 1) & np.isfinite(values) & (values != np.round(values))
    return np.where(moves, np.nextafter(values, np.zeros_like(values)), values)


def signs(count, dtype):
    """Of vectors: the second, the fourth, ... are turned around."""
    return np.where(np.arange(count) % 2 == 1, -1, 1).astype(dtype)
