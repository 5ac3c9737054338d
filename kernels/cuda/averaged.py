"""One step of a moving average on CUDA devices."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda
from numpy import uint32, uint64

from kfac_xp.kernels.cuda.launch import configured, current_stream, num_blocks, on_device

SQUARE = (32, 8)
"""Threads along a row, which is also the side of a square, and along a column."""
EACH = 4
"""Elements of a thread at a time, of an array that is only averaged."""


def averaged(total: Any, new: Any, decay: Any, weight: Any, symmetrize: bool = False) -> Any:
    """See ``kfac_xp.averages.averaged``."""
    import cupy

    with new.device:
        out, finite = cupy.empty(new.shape, dtype=new.dtype), cupy.ones((), dtype=cupy.bool_)
        if out.size > 0:
            flat = (a.reshape(-1) for a in (total, new, out, finite))
            old, added, result, flag = on_device(*flat)
            factors = _readable(decay, new.dtype), _readable(weight, new.dtype)
            stream = current_stream()
            check(added, flag, stream=stream)
            n = new.shape[-1] if symmetrize else None
            launch(old, added, *factors, flag, result, n=n, stream=stream)
    return out, finite


def _readable(number: Any, dtype: Any) -> Any:
    """A Python number as a tuple of one, a device's as an array of one: kernels read either."""
    if hasattr(number, "shape"):
        return on_device(number.reshape(1))[0]
    return (dtype.type(number),)


def check(new: Any, finite: Any, *, threads: int = 256, stream: Any = 0) -> None:
    """Set `finite` [1] to False unless all of flat `new` is finite."""
    configured(_check, num_blocks(new.size, EACH * threads), threads, stream)(new, finite)


def launch(
    total: Any,
    new: Any,
    decay: Any,
    weight: Any,
    finite: Any,
    out: Any,
    *,
    n: int | None = None,
    square: tuple[int, int] = SQUARE,
    stream: Any = 0,
) -> None:
    """Fill flat `out`, with the symmetric part of `new` if given `n`.

    With `total` where `finite` [1] is False. All are flat, of matrices [n, n] where there is an
    `n`. `decay` and `weight` hold one number each.
    """
    arguments = total, new, decay, weight, finite, out
    if n is None:
        threads = math.prod(square)
        configured(_average, num_blocks(out.size, EACH * threads), threads, stream)(*arguments)
    else:
        tiles = -(-n // square[0])
        grid = num_blocks(tiles, 1), num_blocks(out.size // n**2 * tiles, 1)
        configured(symmetric(*square), grid, square, stream)(*arguments, np.uint32(n))


# Casts, here and below: see `squared_tiles`. Loads before stores: see `triangles`.
@cuda.jit
def _check(new, finite):
    """Write False to `finite` [1] if an element of `new` [n] is not: see `_average`."""
    width, size = uint64(cuda.blockDim.x), uint64(new.size)
    all_finite = True
    first = uint64(cuda.blockIdx.x) * width * uint64(EACH) + uint64(cuda.threadIdx.x)
    while first < size:
        for m in range(EACH):
            i = first + uint64(m) * width
            if i < size:
                all_finite &= math.isfinite(new[i])
        first += uint64(cuda.gridDim.x) * width * uint64(EACH)
    if not all_finite:
        finite[0] = False  # whoever writes, writes this


@cuda.jit
def _average(total, new, decay, weight, finite, out):
    """Write every element of `out` [n]: a thread a few, as many apart as a block has threads."""
    old, added = cuda.local.array(EACH, out.dtype), cuda.local.array(EACH, out.dtype)
    width, size = uint64(cuda.blockDim.x), uint64(out.size)
    kept, taken, is_taken = decay[0], weight[0], finite[0]
    first = uint64(cuda.blockIdx.x) * width * uint64(EACH) + uint64(cuda.threadIdx.x)
    while first < size:
        for m in range(EACH):
            i = first + uint64(m) * width
            if i < size:
                old[m], added[m] = total[i], new[i]
        for m in range(EACH):
            i = first + uint64(m) * width
            if i < size:
                out[i] = kept * old[m] + taken * added[m] if is_taken else old[m]
        first += uint64(cuda.gridDim.x) * width * uint64(EACH)


@functools.cache
def symmetric(side: int, height: int) -> Any:
    """The kernel for squares of this side, with the arguments of `_average` and `n`.

    It writes every element of `out`, in squares in and below the diagonal together with their
    mirror images. What is read or written is so along rows: the image of `new` is transposed in
    shared memory, and so is the mean of both. A row of the shared square is longer than need be: a
    column of it then lies in all banks.
    """
    row, each = side + 1, side // height

    @cuda.jit
    def average(total, new, decay, weight, finite, out, n):
        square = cuda.shared.array((side, row), out.dtype)
        below, above = cuda.local.array(each, out.dtype), cuda.local.array(each, out.dtype)
        old, old_above = cuda.local.array(each, out.dtype), cuda.local.array(each, out.dtype)
        x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
        half, kept, taken = out.dtype.type(0.5), decay[0], weight[0]
        is_taken = finite[0]
        count = uint32(uint64(out.size) // (uint64(n) * uint64(n)))
        tiles = uint32((n + uint32(side - 1)) // uint32(side))
        item = uint32(cuda.blockIdx.y)
        while item < count * tiles:
            b, low = uint32(item // tiles), uint32(item % tiles)
            right = uint32(cuda.blockIdx.x)
            while right <= low:
                first_i, first_j = uint32(low * uint32(side)), uint32(right * uint32(side))
                # Where the thread's first elements of the square and of its image lie; the others
                # are `height` rows apart.
                here = (uint64(b) * n + uint64(first_i + y)) * n + uint64(first_j + x)
                there = (uint64(b) * n + uint64(first_j + y)) * n + uint64(first_i + x)
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    apart = uint64(uint32(m * height) * n)
                    if first_i + k < n and first_j + x < n:
                        below[m], old[m] = new[here + apart], total[here + apart]
                    if first_j + k < n and first_i + x < n:
                        above[m], old_above[m] = new[there + apart], total[there + apart]
                for m in range(each):
                    square[uint64(y + uint32(m * height)), uint64(x)] = above[m]
                cuda.syncthreads()
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    if first_i + k < n and first_j + x < n:
                        value = half * (below[m] + square[uint64(x), uint64(k)])
                        square[uint64(x), uint64(k)] = value
                        apart = uint64(uint32(m * height) * n)
                        mean = kept * old[m] + taken * value
                        out[here + apart] = mean if is_taken else old[m]
                cuda.syncthreads()
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    if right < low and first_j + k < n and first_i + x < n:
                        apart = uint64(uint32(m * height) * n)
                        mean = kept * old_above[m] + taken * square[uint64(k), uint64(x)]
                        out[there + apart] = mean if is_taken else old_above[m]
                # No barrier: the next square begins with what each thread read last of this one.
                right = uint32(right + cuda.gridDim.x)
            item = uint32(item + cuda.gridDim.y)

    return average
