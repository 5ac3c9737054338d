"""Covariances of patches put together from correlations, on CUDA devices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import cuda
from numpy import uint32, uint64

from kfac_xp.kernels.cuda.launch import configured, current_stream, num_blocks, on_device

# Sides of the squares in which a block (t, u) is made; small channels would leave most of a large
# one empty. A thread has as many rows of a square as the second number goes into the first.
SQUARES = ((8, 8), (16, 8), (32, 8))


def correlation_blocks(
    halves: Any, layout: Any, borders: Sequence[Any] = (), last: Any | None = None
) -> Any:
    """See ``kfac_xp.patch_covariance.blocks.correlation_blocks``. It overwrites nothing."""
    import cupy

    side = layout.blocks.shape[1] * halves.shape[2] + (last is not None)
    with halves.device:
        out = cupy.empty((side, side), dtype=halves.dtype)
        if out.size > 0:
            stream = cupy.cuda.get_current_stream().ptr
            tables = _kept_tables(layout, str(halves.device), stream)
            # Without a last row, any vector will do.
            vector, matrix = on_device(halves.reshape(-1) if last is None else last, out)
            for number, (part, table) in enumerate(zip((halves, *borders), tables, strict=True)):
                added, taps = on_device(part, table)
                launch(added, taps, vector, matrix, adds=number > 0, stream=current_stream())
    return out


@functools.lru_cache(maxsize=256)
def _kept_tables(layout: Any, device: str, stream: int) -> list[Any]:
    """`tables_of` the layout, moved once for each device and stream to the current ones."""
    import cupy

    return [cupy.asarray(table) for table in tables_of(layout)]


def tables_of(layout: Any) -> list[np.ndarray]:
    """For each part of the sum [K, K + 2], for its K taps: pairs of them, block and number."""
    tables = []
    for pairs, blocks in zip(layout.pairs, layout.blocks, strict=True):
        (taps,) = np.nonzero(blocks >= 0)
        columns = [pairs[np.ix_(taps, taps)], blocks[taps], taps]
        tables.append(np.column_stack(columns).astype(np.int64))
    return tables


def launch(
    halves: Any,
    table: Any,
    last: Any,
    out: Any,
    *,
    adds: bool,
    square: tuple[int, int] | None = None,
    stream: Any = 0,
) -> None:
    """Fill `out` from one part `halves` [offsets, B, C, B, C], or add that to it.

    `table` is one of `tables_of`; it must have all taps unless the part is added. `last` is read if
    `out` has a row more than there are taps times C.
    """
    offsets, blocks, channels, _, _ = halves.shape
    square = square or next((s for s in SQUARES if channels <= s[0]), SQUARES[-1])
    tiles = num_blocks(table.shape[0] * -(-channels // square[0]), 1)
    fill = configured(filler(*square), (tiles, tiles), square, stream)
    flat = halves.reshape(halves.size), table, last, out.reshape(out.size)
    fill(*flat, *map(np.uint32, (out.shape[0], offsets, blocks, channels)), adds)


@functools.cache
def filler(side: int, height: int) -> Any:
    """The kernel for squares of this side.

    ``fill(halves, table, last, out, n, offsets, blocks, channels, adds)``, where `halves` and `out`
    are flat, writes every element of `out` [n * n] between the taps of the table, and the last row
    and column. A square is made where it lies in or below the diagonal, and written with its mirror
    image: both summands are read along rows, one is transposed in shared memory, and so is the sum.
    A row of the shared square is longer than need be, so that a column of it lies in all banks.
    """
    row, each = side + 1, side // height

    # Casts: see `squared_tiles`. Loads before stores: see `triangles`.
    @cuda.jit
    def fill(halves, table, last, out, n, offsets, blocks, channels, adds):
        square = cuda.shared.array((side, row), out.dtype)
        direct, mirrored = cuda.local.array(each, out.dtype), cuda.local.array(each, out.dtype)
        old = cuda.local.array(each, out.dtype)
        x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
        num_taps, width = uint32(table.shape[0]), uint32(blocks * channels)
        tiles = uint32((channels + uint32(side - 1)) // uint32(side))
        low = uint32(cuda.blockIdx.y)
        while low < num_taps * tiles:
            t, first_c = uint32(low // tiles), uint32(low % tiles * uint32(side))
            right = uint32(cuda.blockIdx.x)
            while right <= low:
                u, first_e = uint32(right // tiles), uint32(right % tiles * uint32(side))
                d = uint32(table[t, u])
                mirror = uint32(offsets - uint32(1) - d)
                block_t, block_u = uint32(table[t, num_taps]), uint32(table[u, num_taps])
                row_t = uint32(uint32(table[t, num_taps + uint32(1)]) * channels + first_c)
                row_u = uint32(uint32(table[u, num_taps + uint32(1)]) * channels + first_e)
                # Where the thread's first elements lie: of the summands, and of the sum and its
                # image. The others are `height` rows apart.
                row_d = uint32((d * blocks + block_t) * channels + first_c + y)
                row_m = uint32((mirror * blocks + block_u) * channels + first_e + y)
                at_d = uint64(row_d) * uint64(width) + uint64(block_u * channels + first_e + x)
                at_m = uint64(row_m) * uint64(width) + uint64(block_t * channels + first_c + x)
                here = uint64(row_t + y) * uint64(n) + uint64(row_u + x)
                there = uint64(row_u + y) * uint64(n) + uint64(row_t + x)
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    apart = uint64(uint32(m * height) * width)
                    if first_e + k < channels and first_c + x < channels:
                        mirrored[m] = halves[at_m + apart]
                    if first_c + k < channels and first_e + x < channels:
                        direct[m] = halves[at_d + apart]
                        if adds:
                            old[m] = out[here + uint64(uint32(m * height) * n)]
                for m in range(each):
                    square[uint64(y + uint32(m * height)), uint64(x)] = mirrored[m]
                cuda.syncthreads()
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    if first_c + k < channels and first_e + x < channels:
                        # Both summands first: their order is the other way round in the image.
                        value = direct[m] + square[uint64(x), uint64(k)]
                        if adds:
                            value += old[m]
                        out[here + uint64(uint32(m * height) * n)] = value
                        square[uint64(x), uint64(k)] = value
                cuda.syncthreads()
                for m in range(each):
                    k = uint32(y + uint32(m * height))
                    if right < low and first_e + k < channels and first_c + x < channels:
                        out[there + uint64(uint32(m * height) * n)] = square[uint64(k), uint64(x)]
                # No barrier: the next square begins with what each thread read last of this one.
                right = uint32(right + cuda.gridDim.x)
            low = uint32(low + cuda.gridDim.y)
        # The last row and column are written with the part that all taps belong to.
        end = uint32(num_taps * channels)
        if not adds and end < n:
            block = uint32(cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x)
            i = uint32((block * uint32(height) + y) * uint32(side) + x)
            while i <= end:
                value = last[uint64(i)]
                out[uint64(end) * uint64(n) + uint64(i)] = value
                out[uint64(i) * uint64(n) + uint64(end)] = value
                i = uint32(i + cuda.gridDim.x * cuda.gridDim.y * uint32(side * height))

    return fill
