"""Inner products of three vectors with one another on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled


def inner_products_of_three(x: Any, y: Any, z: Any, dtype: Any = None) -> Any:
    """See ``kfac_xp.params.inner_products_of_three``."""
    sums = np.zeros(6)
    _add_products(x.reshape(-1), y.reshape(-1), z.reshape(-1), sums)
    return sums.astype(x.dtype if dtype is None else dtype, copy=False)


@compiled
def _add_products(x, y, z, sums):
    """Add the six sums of products to `sums`: stretches in the vectors' own dtype."""
    n, zero = np.uintp(x.size), x.dtype.type(0)
    start = np.uintp(0)
    while start < n:
        stop = min(start + np.uintp(1024), n)
        xx, xy, yy = zero, zero, zero
        xz, yz, zz = zero, zero, zero
        for i in range(start, stop):
            a, b, c = x[i], y[i], z[i]
            xx += a * a
            xy += a * b
            yy += b * b
            xz += a * c
            yz += b * c
            zz += c * c
        sums[0] += xx
        sums[1] += xy
        sums[2] += yy
        sums[3] += xz
        sums[4] += yz
        sums[5] += zz
        start = stop
