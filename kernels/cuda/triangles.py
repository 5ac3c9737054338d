"""Symmetric matrices packed to their lower triangle, and unpacked, on CUDA devices."""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import cuda
from numpy import uint32, uint64

from kfac_xp.kernels.cuda.launch import bits_on_device, configured, current_stream, num_blocks

SQUARE = (32, 8)
"""Threads along a row, which is also the side of a square, and along a column."""

# Loads that a thread issues before it stores anything.
_EACH = 4


def pack_symmetric(x: Any) -> Any:
    """See ``kfac_xp.ops.pack_symmetric``."""
    import cupy

    *batch, n, _ = x.shape
    with x.device:
        packed = cupy.empty((*batch, n * (n + 1) // 2), dtype=x.dtype)
        if packed.size > 0:
            arrays = x.reshape(-1, n, n), packed.reshape(math.prod(batch), -1)
            launch_pack(*bits_on_device(*arrays), stream=current_stream())
    return packed


def unpack_symmetric(packed: Any, n: int | None = None) -> Any:
    """See ``kfac_xp.ops.unpack_symmetric``."""
    import cupy

    *batch, size = packed.shape
    n = (math.isqrt(8 * size + 1) - 1) // 2
    with packed.device:
        x = cupy.empty((*batch, n, n), dtype=packed.dtype)
        if x.size > 0:
            arrays = packed.reshape(-1, size), x.reshape(-1, n, n)
            launch_unpack(*bits_on_device(*arrays), stream=current_stream())
    return x


def launch_pack(
    matrices: Any, packed: Any, *, threads: tuple[int, int] = SQUARE, stream: Any = 0
) -> None:
    """Fill `packed` [B, n (n + 1) / 2] from `matrices` [B, n, n]."""
    grid = num_blocks(matrices.shape[0] * matrices.shape[1], threads[1])
    configured(_pack, grid, threads, stream)(matrices, packed)


def launch_unpack(
    packed: Any, matrices: Any, *, square: tuple[int, int] = SQUARE, stream: Any = 0
) -> None:
    """Fill `matrices` [B, n, n] from `packed` [B, n (n + 1) / 2]."""
    tiles = -(-matrices.shape[1] // square[0])
    grid = num_blocks(tiles, 1), num_blocks(matrices.shape[0] * tiles, 1)
    configured(unpacker(*square), grid, square, stream)(packed, matrices)


# Casts, here and below: see `squared_tiles`. Arrays may overlap for all that a compiler knows, so
# that a load stays behind the store that is written before it: hence all loads before the first.
@cuda.jit
def _pack(matrices, packed):
    """Write every element of `packed`: a row of threads one row of a matrix, and so on."""
    loaded = cuda.local.array(_EACH, packed.dtype)
    count, n = uint32(matrices.shape[0]), uint32(matrices.shape[1])
    width = uint32(cuda.blockDim.x)
    row = uint32(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y)
    while row < count * n:
        b, i = uint32(row // n), uint32(row % n)
        start = uint64(i) * uint64(i + uint32(1)) // uint64(2)
        j = uint32(cuda.threadIdx.x)
        while j <= i:
            for m in range(_EACH):
                k = uint32(j + uint32(m) * width)
                if k <= i:
                    loaded[m] = matrices[b, i, k]
            for m in range(_EACH):
                k = uint32(j + uint32(m) * width)
                if k <= i:
                    packed[b, start + uint64(k)] = loaded[m]
            j = uint32(j + uint32(_EACH) * width)
        row = uint32(row + cuda.gridDim.x * cuda.blockDim.y)


@functools.cache
def unpacker(side: int, height: int) -> Any:
    """The kernel for squares of this side, ``unpack(packed, matrices)``.

    It writes every element of `matrices`: squares in and below the diagonal as they are read, along
    rows, and their mirror images through shared memory, so that these are written along rows, too.
    A row of the shared square is longer than need be: a column of it then lies in all banks.
    """
    row, each = side + 1, side // height

    @cuda.jit
    def unpack(packed, matrices):
        square = cuda.shared.array((side, row), packed.dtype)
        loaded = cuda.local.array(each, packed.dtype)
        x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
        count, n = uint32(matrices.shape[0]), uint32(matrices.shape[1])
        tiles = uint32((n + uint32(side - 1)) // uint32(side))
        item = uint32(cuda.blockIdx.y)
        while item < count * tiles:
            b, low = uint64(item // tiles), uint32(item % tiles)
            right = uint32(cuda.blockIdx.x)
            while right <= low:
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    i, j = uint32(low * uint32(side) + k), uint32(right * uint32(side) + x)
                    if i < n and j <= i:
                        start = uint64(i) * uint64(i + uint32(1)) // uint64(2)
                        loaded[m] = packed[b, start + uint64(j)]
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    i, j = uint32(low * uint32(side) + k), uint32(right * uint32(side) + x)
                    if i < n and j <= i:
                        matrices[b, uint64(i), uint64(j)] = loaded[m]
                        square[uint64(k), uint64(x)] = loaded[m]
                cuda.syncthreads()
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    j, i = uint32(right * uint32(side) + k), uint32(low * uint32(side) + x)
                    if i < n and j < i:
                        matrices[b, uint64(j), uint64(i)] = square[uint64(x), uint64(k)]
                cuda.syncthreads()
                right = uint32(right + cuda.gridDim.x)
            item = uint32(item + cuda.gridDim.y)

    return unpack
