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
from typing import Any

import numpy as np
from numba import cuda
from numpy import int32, uint32, uint64

from kfac_xp.kernels.cuda.launch import configured, num_blocks
from kfac_xp.kernels.cuda.tiles import Plan, Tile
from kfac_xp.kernels.cuda.vectors import ALIGNS, VECTOR, vectors


def launch(images: Any, grads: Any, sizes: Any, out: Any, *, plan: Plan, stream: Any = 0) -> None:
    """Fill `out` [parts * splits, D (+ 1), C_out] from flat images and gradients: see `tiled`."""
    tile, parts, splits = plan
    _, num_rows, num_columns = out.shape
    blocks = tile.cover(num_rows, num_columns, int(sizes.groups))
    grid = num_blocks(blocks, 1), num_blocks(parts * splits, 1)
    fill = configured(tiled(tile, np.dtype(out.dtype).name), grid, tile.threads, stream)
    fill(images, grads, sizes, *map(np.uint32, (parts, splits, num_rows)), out.reshape(out.size))


@functools.cache
def tiled(tile: Tile, dtype: str) -> Any:
    """The kernel for a tile: ``fill(images, grads, sizes, parts, splits, rows, out)``.

    It writes every element of `out` [parts * splits * rows * C_out], of this dtype, as sums are.
    Each part has some of the cases, and sums of squares; if there are several splits it has one
    case, each split some of its locations, and sums that are not squared. There are D / groups
    rows, or one more for a bias, for which every patch has a 1. `images` [N * space * C] and
    `grads` [N * T * C_out] are flat, too.

    A thread's rows and columns are vectors of neighbours, `threads_d` and `threads_c` vectors
    apart, so that a warp reads neighbouring vectors. While a chunk is multiplied the next one is on
    its way: there are two places for each in shared memory.
    """
    threads_d, threads_c, each_d, each_c, chunk = tile
    threads, height, width = tile.threads, uint32(tile.rows), uint32(tile.columns)
    rows_type, in_row = vectors(dtype, each_d)
    columns_type, in_column = vectors(dtype, each_c)
    row_vectors, column_vectors = tile.rows // in_row, tile.columns // in_column
    rows_size, columns_size = chunk * row_vectors, chunk * column_vectors
    two_rows_sizes, two_columns_sizes = 2 * rows_size, 2 * columns_size
    rows_each, columns_each = chunk * tile.rows // threads, chunk * tile.columns // threads
    columns_apart = uint32(threads // tile.columns)
    # Rows from one that is written to the next by the same thread.
    rows_together = uint32(threads // tile.columns * in_row)
    taps_at_a_time = uint32(threads // chunk)
    # A group has two channels at least.
    max_taps = tile.rows // 2 + 1
    pixel_rows = 2 * (max_taps + 1)

    # Numba computes with integers of 64 bits unless told otherwise, makes floats of a mixture of
    # both signs, and lets a signed index count from the end: hence the casts. A cast of what is
    # negative is large, so that one comparison sees both ends of an image.
    @cuda.jit
    def fill(images, grads, sizes, num_parts, num_splits, num_rows, out):
        if ALIGNS:
            rows = cuda.shared.array(two_rows_sizes, rows_type, VECTOR)
            columns = cuda.shared.array(two_columns_sizes, columns_type, VECTOR)
        else:
            rows = cuda.shared.array(two_rows_sizes, rows_type)
            columns = cuda.shared.array(two_columns_sizes, columns_type)
        # Of each tap of the tile's rows: where it lies from a patch's corner.
        tap_0 = cuda.shared.array(max_taps, int32)
        tap_1 = cuda.shared.array(max_taps, int32)
        tap_2 = cuda.shared.array(max_taps, int32)
        tap_at = cuda.shared.array(max_taps, int32)
        # Of each tap and location of a chunk: where the pixel lies, -1 if there is none. There is
        # none for the last tap, that of rows which are not of a patch.
        pixels = cuda.shared.array((pixel_rows, chunk), int32)
        sums = cuda.local.array((each_d, each_c), out.dtype)
        totals = cuda.local.array((each_d, each_c), out.dtype)
        left = cuda.local.array(each_d, out.dtype)
        right = cuda.local.array(each_c, out.dtype)
        loaded_rows = cuda.local.array(rows_each, out.dtype)
        loaded_columns = cuda.local.array(columns_each, out.dtype)
        zero = out.dtype.type(0)
        thread = uint32(cuda.threadIdx.x)
        # Pairs of threads along a column, rows of them, and so on.
        x = uint32(thread // uint32(2) % uint32(threads_c))
        y = uint32(thread % uint32(2) + thread // uint32(2 * threads_c) * uint32(2))

        def multiply(row, column):
            for i in range(each_d):
                left[i] = rows[row + uint64(i // in_row * threads_d)]["v"][i % in_row]
            for j in range(each_c):
                right[j] = columns[column + uint64(j // in_column * threads_c)]["v"][j % in_column]
            for i in range(each_d):
                for j in range(each_c):
                    sums[i, j] += left[i] * right[j]

        num_locations, c_out = uint32(sizes.locations), uint32(sizes.groups * sizes.group_out)
        # Of a case with one location the squares of the product are the product of the squares, and
        # the sum over cases is that of one long case.
        is_single = num_locations == uint32(1)
        is_plain = is_single or num_splits > uint32(1)
        period = uint32(2**31 - 1) if is_plain else num_locations
        tiles_d = uint32((num_rows + (height - uint32(1))) // height)
        tiles_c = uint32((sizes.group_out + (width - uint32(1))) // width)
        # By how much a location's indices grow from one chunk to the next, before carries.
        step_n = uint32(uint32(chunk) // num_locations)
        rest = uint32(uint32(chunk) % num_locations)
        step_2 = uint32(rest % sizes.out_2)
        rest = uint32(rest // sizes.out_2)
        step_1, step_0 = uint32(rest % sizes.out_1), uint32(rest // sizes.out_1)
        ahead = uint32(0)  # the place of the chunk that is on its way
        # Where the thread puts what it gathers, and the location for which it finds pixels.
        first_k = uint32(thread // height * uint32(rows_each))
        own_row = uint32(first_k * uint32(row_vectors) + thread % height // uint32(in_row))
        own_column = uint32(thread // uint32(in_column))
        k = uint32(thread % uint32(chunk))
        pixels[max_taps, uint64(k)] = pixels[2 * max_taps + 1, uint64(k)] = int32(-1)
        item = uint32(cuda.blockIdx.x)
        while item < tiles_d * tiles_c * sizes.groups:
            rest = uint32(item // tiles_d)
            first_d = uint32(item % tiles_d * height)
            group = uint32(rest // tiles_c)
            first_c = uint32(group * sizes.group_out + rest % tiles_c * width)
            end_c = uint32((group + uint32(1)) * sizes.group_out)
            item = uint32(item + cuda.gridDim.x)
            first_tap = uint32(first_d // sizes.group_in)
            num_taps = uint32(0)
            if first_d < sizes.entries:
                last = uint32(first_d + (height - uint32(1)))
                if last >= sizes.entries:
                    last = uint32(sizes.entries - uint32(1))
                num_taps = uint32(last // sizes.group_in - first_tap + uint32(1))
            m = thread
            while m < num_taps:
                tap = uint32(first_tap + m)
                rest = uint32(tap // sizes.taps_2)
                s_0 = int32(int32(rest // sizes.taps_1) * sizes.dilation_0)
                s_1 = int32(int32(rest % sizes.taps_1) * sizes.dilation_1)
                s_2 = int32(int32(tap % sizes.taps_2) * sizes.dilation_2)
                tap_0[m], tap_1[m], tap_2[m] = s_0, s_1, s_2
                tap_at[m] = s_0 * sizes.step_0 + s_1 * sizes.step_1 + s_2 * sizes.step_2
                m = uint32(m + uint32(threads))
            cuda.syncthreads()
            # Each thread gathers one row and one column, at some of the locations of a chunk. Where
            # there is none, what it gathers is not used.
            d = uint32(first_d + thread % height)
            c = uint32(first_c + thread % width)
            c = c if c < end_c else first_c
            is_patch = d < sizes.entries
            outside = out.dtype.type(d == sizes.entries)
            tap = uint32(d // sizes.group_in - first_tap) if is_patch else uint32(max_taps)
            channel = int32(group * sizes.group_in + d % sizes.group_in)
            part = uint32(cuda.blockIdx.y)
            while part < num_parts * num_splits:
                # Locations of the part, counted through all cases.
                whole, split = uint64(part // num_splits), uint64(part % num_splits)
                case = uint32(uint64(sizes.cases) * whole // num_parts)
                end_case = uint32(uint64(sizes.cases) * (whole + uint64(1)) // num_parts)
                before = uint32(num_locations * split // num_splits)
                first = uint32(case * num_locations + before)
                end = uint32(num_locations * (split + uint64(1)) // num_splits)
                end = uint32(uint32(end_case - uint32(1)) * num_locations + end)
                remaining = uint32(end - first)
                # Where the gradients of the thread's column lie, first and last.
                grad = uint32(uint32(first + thread // width) * c_out + c)
                last = uint32(uint32(end - uint32(1)) * c_out + c)
                # The location for which the thread finds pixels.
                n = uint32(uint32(first + k) // num_locations)
                rest = uint32(uint32(first + k) % num_locations)
                o_2 = uint32(rest % sizes.out_2)
                rest = uint32(rest // sizes.out_2)
                o_1, o_0 = uint32(rest % sizes.out_1), uint32(rest // sizes.out_1)
                for i in range(each_d):
                    for j in range(each_c):
                        sums[i, j] = zero
                        totals[i, j] = zero
                # How many locations of its case are multiplied, how many there are to multiply now.
                t, count = uint32(0), uint32(0)
                goes_on = True
                while goes_on:
                    coming = remaining if remaining < uint32(chunk) else uint32(chunk)
                    remaining = uint32(remaining - coming)
                    i_0 = int32(int32(o_0) * sizes.stride_0 - sizes.before_0)
                    i_1 = int32(int32(o_1) * sizes.stride_1 - sizes.before_1)
                    i_2 = int32(int32(o_2) * sizes.stride_2 - sizes.before_2)
                    at = int32(i_0 * sizes.step_0 + i_1 * sizes.step_1 + i_2 * sizes.step_2)
                    at = int32(at + int32(n) * sizes.step_case)
                    m = uint32(thread // uint32(chunk))
                    while m < num_taps:
                        inside = k < coming
                        inside &= uint32(i_0 + tap_0[m]) < sizes.size_0
                        inside &= uint32(i_1 + tap_1[m]) < sizes.size_1
                        inside &= uint32(i_2 + tap_2[m]) < sizes.size_2
                        pixel = int32(at + tap_at[m])
                        m_ahead = uint32(m + ahead * uint32(max_taps + 1))
                        pixels[uint64(m_ahead), uint64(k)] = pixel if inside else int32(-1)
                        m = uint32(m + taps_at_a_time)
                    o_2 = uint32(o_2 + step_2)
                    over = o_2 >= sizes.out_2
                    o_2 = uint32(o_2 - sizes.out_2) if over else o_2
                    o_1 = uint32(o_1 + step_1 + uint32(over))
                    over = o_1 >= sizes.out_1
                    o_1 = uint32(o_1 - sizes.out_1) if over else o_1
                    o_0 = uint32(o_0 + step_0 + uint32(over))
                    over = o_0 >= sizes.out_0
                    o_0 = uint32(o_0 - sizes.out_0) if over else o_0
                    n = uint32(n + step_n + uint32(over))
                    cuda.syncthreads()
                    tap_ahead = uint64(uint32(tap + ahead * uint32(max_taps + 1)))
                    for i in range(rows_each):
                        pixel = pixels[tap_ahead, uint64(first_k) + uint64(i)]
                        loaded_rows[i] = outside
                        if pixel >= int32(0):
                            value = images[uint64(uint32(pixel + channel))]
                            loaded_rows[i] = out.dtype.type(value)
                    for j in range(columns_each):
                        at_c = uint32(grad + uint32(j) * columns_apart * c_out)
                        at_c = at_c if at_c < last else last
                        loaded_columns[j] = out.dtype.type(grads[uint64(at_c)])
                    grad = uint32(grad + uint32(chunk) * c_out)
                    here = uint32(uint32(1) - ahead)
                    row = uint64(uint32(y + here * uint32(rows_size)))
                    column = uint64(uint32(x + here * uint32(columns_size)))
                    u = uint32(0)
                    while u < count:
                        # Up to the end of the case, or of the chunk.
                        stop = uint32(u + (period - t))
                        if stop > count:
                            stop = count
                        t = uint32(t + (stop - u))
                        while uint32(u + uint32(1)) < stop:
                            multiply(row, column)
                            multiply(row + uint64(row_vectors), column + uint64(column_vectors))
                            row += uint64(2 * row_vectors)
                            column += uint64(2 * column_vectors)
                            u = uint32(u + uint32(2))
                        if u < stop:
                            multiply(row, column)
                            row += uint64(row_vectors)
                            column += uint64(column_vectors)
                            u = uint32(u + uint32(1))
                        if t == period:
                            t = uint32(0)
                            for i in range(each_d):
                                for j in range(each_c):
                                    totals[i, j] += sums[i, j] * sums[i, j]
                                    sums[i, j] = zero
                    if is_single:
                        for i in range(rows_each):
                            loaded_rows[i] *= loaded_rows[i]
                        for j in range(columns_each):
                            loaded_columns[j] *= loaded_columns[j]
                    row = uint64(uint32(own_row + ahead * uint32(rows_size)))
                    for i in range(rows_each):
                        vector = rows[row + uint64(i * row_vectors)]["v"]
                        vector[uint64(thread % uint32(in_row))] = loaded_rows[i]
                    column = uint64(uint32(own_column + ahead * uint32(columns_size)))
                    for j in range(columns_each):
                        vector = columns[column + uint64(j * threads // in_column)]["v"]
                        vector[uint64(thread % uint32(in_column))] = loaded_columns[j]
                    ahead = here
                    count = coming
                    goes_on = count > uint32(0)
                if is_plain:
                    for i in range(each_d):
                        for j in range(each_c):
                            totals[i, j] = sums[i, j]
                # Through shared memory, one row of each thread at a time, so that neighbours are
                # written together.
                row_d = uint32(first_d + thread // width * uint32(in_row))
                column_c = uint32(first_c + thread % width)
                start = (uint64(part) * num_rows + row_d) * c_out + uint64(column_c)
                stop_at = (uint64(part) + uint64(1)) * num_rows * c_out
                stop_at = stop_at if column_c < end_c else uint64(0)
                for i in range(each_d):
                    cuda.syncthreads()
                    own = uint64(uint32(y * uint32(column_vectors) + x))
                    for j in range(each_c):
                        vector = columns[own + uint64(j // in_column * threads_c)]["v"]
                        vector[j % in_column] = totals[i, j]
                    cuda.syncthreads()
                    own = uint64(thread // uint32(in_column))
                    below = uint32(i // in_row * threads_d * in_row + i % in_row)
                    place = start + uint64(below * c_out)
                    for j in range(each_c):
                        vector = columns[own + uint64(j * threads // in_column)]["v"]
                        value = vector[uint64(thread % uint32(in_column))]
                        if place < stop_at:
                            out[place] = value
                        place += uint64(rows_together * c_out)
                part = uint32(part + cuda.gridDim.y)

    return fill
