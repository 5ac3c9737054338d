"""Squares of matrix products, added up over cases, in tiles that stay in registers.

For images [N, *space, C] under a filter and gradients [N, T, C_out],

    out[d, c] = sum_n (sum_t patches[n, t, d] * grads[n, t, c]) ** 2.

A block of threads owns one tile of `out` and a range of cases. It walks through the locations of
its cases in chunks: the patch entries and gradients of a chunk are gathered into shared memory, and
each thread multiplies its own few rows and columns of them. Where a case ends the products are
squared, added to the totals and begun anew. Neither patches nor the gradients of a case exist
anywhere else.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numpy import int32, int64, uint32, uint64

from kfac_xp.kernels.cuda.launch import configured, num_blocks


class Tile(NamedTuple):
    """What a block of threads computes at a time.

    Parameters
    ----------
    threads_d, threads_c
        Threads along rows and columns.
    each_d, each_c
        Rows and columns of each thread, whose products take twice as many registers. `each_d` must
        divide `threads_c`, and `each_c` `threads_d`.
    chunk
        Locations in shared memory at a time: not more than there are threads, and a multiple of
        both quotients.
    """

    threads_d: int = 16
    threads_c: int = 16
    each_d: int = 4
    each_c: int = 4
    chunk: int = 16

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.threads_d * self.each_d

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.threads_c * self.each_c


# A thread's registers hold two of its share of a tile. These leave room for two blocks and more on
# a multiprocessor: see `python -m benchmarks.ptx`.
TALL, SQUARE, NARROW = Tile(each_d=8), Tile(), Tile(each_c=2)
TILES = {"float32": (TALL, SQUARE, NARROW), "float64": (NARROW,)}
"""By the dtype of the sums."""


def tile_for(shape: tuple[int, int], groups: int, dtype: Any) -> Tile:
    """The tile for a result of this shape, of which each group has some columns."""
    rows, columns = shape[0], shape[1] // groups
    if TALL not in TILES[np.dtype(dtype).name] or columns <= NARROW.columns:
        return NARROW
    return SQUARE if rows <= SQUARE.rows else TALL


def num_tiles(shape: tuple[int, int], groups: int, dtype: Any, *, tile: Tile | None = None) -> int:
    """How many tiles there are: the blocks for each part of the cases."""
    tile = tile or tile_for(shape, groups, dtype)
    return groups * -(-shape[0] // tile.rows) * -(-shape[1] // groups // tile.columns)


def launch(
    images: Any, grads: Any, sizes: Any, out: Any, *, tile: Tile | None = None, stream: Any = 0
) -> None:
    """Fill `out` [parts, D (+ 1), C_out] from flat images and gradients: see `tiled`."""
    parts, *shape = out.shape
    groups = int(sizes.groups)
    tile = tile or tile_for(shape, groups, out.dtype)
    tiles = num_tiles(shape, groups, out.dtype, tile=tile)
    grid = num_blocks(tiles, 1), num_blocks(parts, 1)
    fill = configured(tiled(tile), grid, (tile.threads_c, tile.threads_d), stream)
    fill(images, grads, sizes, out)


@functools.cache
def tiled(tile: Tile) -> Any:
    """The kernel for one tile, ``fill(images, grads, sizes, out)``.

    It writes every element of `out` [parts, D / groups (+ 1), C_out], with sums of its dtype. Each
    part has some of the cases. The row beyond the entries of a patch is that of the bias, for which
    every patch has a 1. `images` [N * space * C] and `grads` [N * T * C_out] are flat.
    """
    threads_d, threads_c, each_d, each_c, chunk = tile
    threads, height, width = threads_d * threads_c, uint32(tile.rows), uint32(tile.columns)
    rows_size, columns_size = chunk * tile.rows, chunk * tile.columns
    rows_each, columns_each = rows_size // threads, columns_size // threads
    rows_apart, columns_apart = threads // tile.rows, threads // tile.columns
    loads = rows_each + columns_each

    # Numba computes with integers of 64 bits unless told otherwise, makes floats of a mixture of
    # both signs, and lets a signed index count from the end: hence the casts. A cast of what is
    # negative is large, so that one comparison sees both ends of an image.
    @cuda.jit
    def fill(images, grads, sizes, out):
        rows = cuda.shared.array(rows_size, out.dtype)
        columns = cuda.shared.array(columns_size, out.dtype)
        # Where the patch of each location of a chunk begins: along each axis, and in memory.
        corner_0 = cuda.shared.array(chunk, int32)
        corner_1 = cuda.shared.array(chunk, int32)
        corner_2 = cuda.shared.array(chunk, int32)
        corner = cuda.shared.array(chunk, int64)
        sums = cuda.local.array((each_d, each_c), out.dtype)
        totals = cuda.local.array((each_d, each_c), out.dtype)
        left = cuda.local.array(each_d, out.dtype)
        loaded = cuda.local.array(loads, out.dtype)
        zero = out.dtype.type(0)
        x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
        thread = uint32(y * threads_c + x)
        num_locations = uint32(sizes.locations)
        num_rows, c_out = uint32(out.shape[1]), uint32(out.shape[2])
        tiles_d = uint32((num_rows + (height - 1)) // height)
        tiles_c = uint32((sizes.group_out + (width - 1)) // width)
        item = uint32(cuda.blockIdx.x)
        while item < tiles_d * tiles_c * sizes.groups:
            rest = uint32(item // tiles_d)
            first_d = uint32(item % tiles_d * height)
            group = uint32(rest // tiles_c)
            first_c = uint32(group * sizes.group_out + rest % tiles_c * width)
            end_c = uint32((group + 1) * sizes.group_out)
            item = uint32(item + cuda.gridDim.x)
            # Each thread gathers one row and one column, at some of the locations of a chunk.
            d = uint32(first_d + thread % height)
            c = uint32(first_c + thread % width)
            tap = uint32(d // sizes.group_in)
            rest = uint32(tap // sizes.taps_2)
            shift_0 = int32(rest // sizes.taps_1 * sizes.dilation_0)
            shift_1 = int32(rest % sizes.taps_1 * sizes.dilation_1)
            shift_2 = int32(tap % sizes.taps_2 * sizes.dilation_2)
            shift = int32(shift_0 * sizes.step_0 + shift_1 * sizes.step_1 + shift_2 * sizes.step_2)
            shift = int32(shift + int32(group * sizes.group_in + d % sizes.group_in))
            is_patch = d < sizes.entries
            outside = out.dtype.type(d == sizes.entries)
            part = int64(cuda.blockIdx.y)
            while part < out.shape[0]:
                case = int64(sizes.cases) * part // out.shape[0]
                remaining = int64(sizes.cases) * (part + 1) // out.shape[0] - case
                remaining *= num_locations
                # Of the first location of a chunk: its number in its case, and where its gradients
                # and its image lie.
                t = uint32(0)
                grad = uint64(case * num_locations * c_out + c)
                image = case * sizes.step_case
                for i in range(each_d):
                    for j in range(each_c):
                        sums[i, j] = zero
                        totals[i, j] = zero
                while remaining > 0:
                    count = uint32(chunk)
                    if remaining < chunk:
                        count = uint32(remaining)
                    if thread < chunk:
                        o = uint32(t + thread)
                        ahead = uint32(o // num_locations)
                        o = uint32(o % num_locations)
                        rest = uint32(o // sizes.out_2)
                        i_0 = int32(int32(rest // sizes.out_1) * sizes.stride_0 - sizes.before_0)
                        i_1 = int32(int32(rest % sizes.out_1) * sizes.stride_1 - sizes.before_1)
                        i_2 = int32(int32(o % sizes.out_2) * sizes.stride_2 - sizes.before_2)
                        first = i_0 * sizes.step_0 + i_1 * sizes.step_1 + i_2 * sizes.step_2
                        corner_0[thread], corner_1[thread], corner_2[thread] = i_0, i_1, i_2
                        corner[thread] = image + int64(ahead) * sizes.step_case + int32(first)
                    cuda.syncthreads()
                    # Loads without branches, all of them before the first store.
                    for i in range(rows_each):
                        k = uint32(thread // height + i * rows_apart)
                        inside = is_patch & (k < count)
                        inside &= uint32(corner_0[k] + shift_0) < sizes.size_0
                        inside &= uint32(corner_1[k] + shift_1) < sizes.size_1
                        inside &= uint32(corner_2[k] + shift_2) < sizes.size_2
                        value = images[uint64(corner[k] + shift) if inside else uint64(0)]
                        loaded[i] = out.dtype.type(value) if inside else outside
                    for j in range(columns_each):
                        k = uint32(thread // width + j * columns_apart)
                        inside = (c < end_c) & (k < count)
                        value = grads[grad + uint64(k * c_out) if inside else uint64(0)]
                        loaded[rows_each + j] = out.dtype.type(value) if inside else zero
                    for i in range(rows_each):
                        rows[uint64(thread + i * threads)] = loaded[i]
                    for j in range(columns_each):
                        columns[uint64(thread + j * threads)] = loaded[rows_each + j]
                    cuda.syncthreads()
                    k = uint32(0)
                    row, column = uint64(y), uint64(x)
                    while k < count:
                        # Up to the end of the case, or of the chunk.
                        stop = uint32(k + (num_locations - t))
                        if stop > count:
                            stop = count
                        t = uint32(t + (stop - k))
                        while k < stop:
                            for i in range(each_d):
                                left[i] = rows[row + uint64(i * threads_d)]
                            for j in range(each_c):
                                right = columns[column + uint64(j * threads_c)]
                                for i in range(each_d):
                                    sums[i, j] += left[i] * right
                            row += height
                            column += width
                            k = uint32(k + 1)
                        if t == num_locations:
                            t = uint32(0)
                            image += sizes.step_case
                            for i in range(each_d):
                                for j in range(each_c):
                                    totals[i, j] += sums[i, j] * sums[i, j]
                                    sums[i, j] = zero
                    remaining -= chunk
                    grad += uint64(chunk * c_out)
                for i in range(each_d):
                    row = uint64(first_d + y + uint32(i * threads_d))
                    for j in range(each_c):
                        column = uint64(first_c + x + uint32(j * threads_c))
                        if row < num_rows and column < end_c:
                            out[uint64(part), row, column] = totals[i, j]
                part += cuda.gridDim.y

    return fill
