"""Products of rows with the same rows further down, in strided batches of cuBLAS."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def shifted_products(rows: Any, steps: Sequence[int]) -> Any:
    """See ``kfac_xp.patch_covariance.offsets.shifted_products``.

    One call for all steps that are equally far apart: their second operands are one array, begun
    at equally distant rows. Where a step is not the largest, the last rows are zero and left out.
    """
    import cupy
    from cupy.cuda import cublas

    with rows.device:
        count, channels = rows.shape
        out = cupy.empty((len(steps), channels, channels), dtype=rows.dtype)
        used = count - max(steps, default=0)
        if out.size == 0:
            return out
        if used <= 0:  # all rows are zero
            out[...] = 0
            return out
        rows = cupy.ascontiguousarray(rows)
        is_single = rows.dtype == np.float32
        multiply = cublas.sgemmStridedBatched if is_single else cublas.dgemmStridedBatched
        # Read on the host when the product is launched.
        one, zero = np.ones((), rows.dtype), np.zeros((), rows.dtype)
        handle = cupy.cuda.device.get_cublas_handle()
        row, block = channels * rows.itemsize, channels**2 * rows.itemsize
        for first, length, apart in runs(steps):
            # cuBLAS sees columns for rows: out[i]^T = rows[step_i:]^T rows, of rows^T [C, M].
            multiply(
                *(handle, cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T, channels, channels, used),
                *(one.ctypes.data, rows.data.ptr + steps[first] * row, channels, apart * channels),
                *(rows.data.ptr, channels, 0, zero.ctypes.data),
                *(out.data.ptr + first * block, channels, channels**2, length),
            )
    return out


def runs(steps: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cuts steps into runs at equal distances: ``(index of the first, how many, distance)``."""
    first = 0
    while first < len(steps):
        apart = steps[first + 1] - steps[first] if first + 1 < len(steps) else 0
        last = first
        for i, (step, following) in enumerate(itertools.pairwise(steps[first:]), start=first):
            if following - step != apart:
                break
            last = i + 1
        yield first, last - first + 1, apart
        first = last + 1
