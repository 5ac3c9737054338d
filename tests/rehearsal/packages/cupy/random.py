"""``cupy.random``: the methods of a `Generator`, which has fewer than NumPy's (no `normal`)."""

import numpy as np

from cupy._array import ndarray, new
from cupy._signatures import checked, checked_class


@checked_class("cupy.random.Generator")
class Generator:
    """Draws on the device; here NumPy's."""

    def __init__(self, rng):
        self._rng = rng

    def random(self, size=None, dtype=np.float64, out=None):
        """Uniform in [0, 1)."""
        return new(np.asarray(self._rng.random(size, dtype=dtype)))

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        """Normal."""
        return new(np.asarray(self._rng.standard_normal(size, dtype=dtype)))

    def uniform(self, low=0.0, high=1.0, size=None, dtype=np.float64):
        """Uniform in [low, high)."""
        low, high = (x._a if isinstance(x, ndarray) else x for x in (low, high))
        return new(np.asarray(self._rng.uniform(low, high, size), dtype=dtype))

    def integers(self, low, high=None, size=None, dtype=np.int64, endpoint=False):
        """Integers in [low, high)."""
        return new(np.asarray(self._rng.integers(low, high, size, dtype, endpoint)))


@checked("cupy.random", "default_rng")
def default_rng(seed=None):
    """A new generator."""
    return Generator(np.random.default_rng(seed))
