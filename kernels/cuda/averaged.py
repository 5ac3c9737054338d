"""One step of a moving average on CUDA devices."""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import cuda
from numpy import uint32, uint64

from kfac_xp.kernels.cuda.launch import configured, current_stream, num_blocks, on_device

SQUARE = (32, 8)
"""Threads along a row, which is also the side of a square, and along a column."""


def averaged(total: Any, new: Any, decay: Any, weight: Any, symmetrize: bool = False) -> Any:
    """See ``kfac_xp.averages.averaged``."""
    import cupy

    with new.device:
        out, finite = cupy.empty(new.shape, dtype=new.dtype), cupy.ones((), dtype=cupy.bool_)
        if out.size > 0:
            shape = (-1, *new.shape[-2:]) if symmetrize else (-1,)
            shaped = (a.reshape(shape) for a in (total, new, out))
            old, added, result, flag = on_device(*shaped, finite.reshape(1))
            factors = _readable(decay, new.dtype), _readable(weight, new.dtype)
            stream = current_stream()
            check(added, flag, stream=stream)
            launch(old, added, *factors, flag, result, stream=stream)
    return out, finite


def _readable(number: Any, dtype: Any) -> Any:
    """A Python number as a tuple of one, a device's as an array of one: kernels read either."""
    if hasattr(number, "shape"):
        return on_device(number.reshape(1))[0]
    return (dtype.type(number),)


def check(new: Any, finite: Any, *, threads: int = 256, stream: Any = 0) -> None:
    """Set `finite` [1] to False unless all of `new` is finite."""
    flat = new.reshape(new.size)
    configured(_check, num_blocks(new.size, threads), threads, stream)(flat, finite)


def launch(
    total: Any,
    new: Any,
    decay: Any,
    weight: Any,
    finite: Any,
    out: Any,
    *,
    square: tuple[int, int] = SQUARE,
    stream: Any = 0,
) -> None:
    """Fill `out` [n], or [B, n, n] with the symmetric part of `new`.

    With `total` where `finite` [1] is False. `decay` and `weight` hold one number each.
    """
    arguments = total, new, decay, weight, finite, out
    if out.ndim == 1:
        threads = math.prod(square)
        configured(_average, num_blocks(out.size, threads), threads, stream)(*arguments)
    else:
        tiles = -(-out.shape[1] // square[0])
        grid = num_blocks(tiles, 1), num_blocks(out.shape[0] * tiles, 1)
        configured(symmetric(*square), grid, square, stream)(*arguments)


# Casts, here and below: see `squared_tiles`.
@cuda.jit
def _check(new, finite):
    """Write False to `finite` [1] if an element of `new` [n] is not: thread i looks at i, ..."""
    for i in range(cuda.grid(1), new.size, cuda.gridsize(1)):
        if not math.isfinite(new[uint64(i)]):
            finite[0] = False  # whoever writes, writes this


@cuda.jit
def _average(total, new, decay, weight, finite, out):
    """Write every element of `out` [n]: thread i the elements i, i + number of threads, ..."""
    is_taken = finite[0]
    for i in range(cuda.grid(1), out.size, cuda.gridsize(1)):
        value = total[uint64(i)]
        if is_taken:
            value = decay[0] * value + weight[0] * new[uint64(i)]
        out[uint64(i)] = value


@functools.cache
def symmetric(side: int, height: int) -> Any:
    """The kernel for squares of this side, with the arguments of `_average`, of shape [B, n, n].

    It writes every element of `out`, in squares in and below the diagonal together with their
    mirror images. What is read or written is so along rows: the image of `new` is transposed in
    shared memory, and so is the mean of both. A row of the shared square is longer than need be: a
    column of it then lies in all banks.
    """
    row, each = side + 1, side // height

    @cuda.jit
    def average(total, new, decay, weight, finite, out):
        square = cuda.shared.array((side, row), out.dtype)
        x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
        half, is_taken = out.dtype.type(0.5), finite[0]
        count, n = uint32(out.shape[0]), uint32(out.shape[1])
        tiles = uint32((n + (side - 1)) // side)
        item = uint32(cuda.blockIdx.y)
        while item < count * tiles:
            b, low = uint64(item // tiles), uint32(item % tiles)
            right = uint32(cuda.blockIdx.x)
            while right <= low:
                for m in range(each):
                    k = uint32(y + m * height)
                    j, i = uint32(right * side + k), uint32(low * side + x)
                    if j < n and i < n:
                        square[k, x] = new[b, j, i]
                cuda.syncthreads()
                for m in range(each):
                    k = uint32(y + m * height)
                    i, j = uint32(low * side + k), uint32(right * side + x)
                    if i < n and j < n:
                        value = half * (new[b, i, j] + square[x, k])
                        square[x, k] = value
                        result = total[b, i, j]
                        if is_taken:
                            result = decay[0] * result + weight[0] * value
                        out[b, i, j] = result
                cuda.syncthreads()
                for m in range(each):
                    k = uint32(y + m * height)
                    j, i = uint32(right * side + k), uint32(low * side + x)
                    if right < low and j < n and i < n:
                        result = total[b, j, i]
                        if is_taken:
                            result = decay[0] * result + weight[0] * square[k, x]
                        out[b, j, i] = result
                cuda.syncthreads()
                right = uint32(right + cuda.gridDim.x)
            item = uint32(item + cuda.gridDim.y)

    return average
