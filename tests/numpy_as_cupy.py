"""NumPy in CuPy's place: the little that callers of CUDA kernels use of it.

`tests/rehearsal` has a stand-in for everything else.
"""

import contextlib
from types import SimpleNamespace

import numpy as np


class Placed(np.ndarray):
    """An array with CuPy's `device`, which is a context, and its `data`, which have an address."""

    device = contextlib.nullcontext()

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


def placed(x):
    """An array that looks as if it were on a device."""
    return np.asarray(x).view(Placed)


class Cupy:
    """NumPy under CuPy's name. Of a new array what is not written stays NaN, or -1."""

    cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0))

    def __getattr__(self, name):
        return getattr(np, name)

    def ascontiguousarray(self, a):
        return placed(np.ascontiguousarray(a))

    def empty(self, shape, dtype):
        hole = np.nan if np.issubdtype(dtype, np.floating) else -1
        return placed(np.full(shape, hole, dtype=dtype))

    def zeros(self, shape, dtype):
        return placed(np.zeros(shape, dtype=dtype))

    def ones(self, shape, dtype):
        return placed(np.ones(shape, dtype=dtype))
