"""Squares of sums over locations, added up over cases, for filters that read one channel each.

The depthwise case of what ``squared_tiles`` computes, where there is no matrix product to tile: an
entry of the result is a sum of products of one channel's pixels with one channel's gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numpy import int32, int64, uint32, uint64

from kfac_xp.kernels.cuda.launch import configured, num_blocks

# Rows (taps) of each thread, which share its loads of gradients.
EACH = 4
# Threads along the columns, and at most along the rows.
THREADS = (32, 8)


# Where there are fewer blocks for all cases together, the cases are divided into parts, and if need
# be their locations, so that there are about so many. The number does not depend on the device: the
# result's last bits would.
_BLOCKS = 2048
# Locations that are worth a block's start.
_LOCATIONS = 64


def division(num_columns: int, num_cases: int, num_locations: int) -> tuple[int, int]:
    """Parts of the cases and splits of the locations, as in ``tiles.Plan``."""
    wanted = max(1, _BLOCKS // -(-num_columns // THREADS[0]))
    if num_cases >= wanted:
        return wanted, 1
    return max(1, num_cases), max(1, min(wanted // max(1, num_cases), num_locations // _LOCATIONS))


def launch(
    images: Any,
    grads: Any,
    sizes: Any,
    out: Any,
    *,
    splits: int = 1,
    threads: tuple[int, int] = THREADS,
    stream: Any = 0,
) -> None:
    """Fill `out` [parts * splits, taps (+ 1), C_out] from flat images and gradients."""
    _, num_rows, c_out = out.shape
    block = (threads[0], min(-(-num_rows // EACH), threads[1]))
    grid = num_blocks(c_out, block[0]), num_blocks(out.shape[0], 1)
    configured(_fill, grid, block, stream)(images, grads, sizes, np.uint32(splits), out)


@cuda.jit
def _fill(images, grads, sizes, num_splits, out):
    """Write every element of `out`: each thread `EACH` rows of one column and part, and so on.

    Parts, splits and casts as in ``squared_tiles``.
    """
    shift_0 = cuda.local.array(EACH, int32)
    shift_1 = cuda.local.array(EACH, int32)
    shift_2 = cuda.local.array(EACH, int32)
    shift = cuda.local.array(EACH, int32)
    sums = cuda.local.array(EACH, out.dtype)
    totals = cuda.local.array(EACH, out.dtype)
    zero = out.dtype.type(0)
    num_rows, c_out = uint32(out.shape[1]), uint32(out.shape[2])
    num_parts = uint32(uint32(out.shape[0]) // num_splits)
    item = uint32(cuda.blockIdx.y)
    while item < num_parts * num_splits:
        part, split = uint64(item // num_splits), uint64(item % num_splits)
        first_case = int64(uint64(sizes.cases) * part // num_parts)
        end_case = int64(uint64(sizes.cases) * (part + uint64(1)) // num_parts)
        first_location = uint32(uint64(sizes.locations) * split // num_splits)
        end_location = uint32(uint64(sizes.locations) * (split + uint64(1)) // num_splits)
        rest = uint32(first_location // sizes.out_2)
        first_2 = uint32(first_location % sizes.out_2)
        first_1, first_0 = uint32(rest % sizes.out_1), uint32(rest // sizes.out_1)
        c = uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        while c < c_out:
            first = uint32(cuda.threadIdx.y * EACH)
            while first < num_rows:
                for i in range(EACH):
                    tap = uint32(first + i)
                    rest = uint32(tap // sizes.taps_2)
                    s_0 = int32(int32(rest // sizes.taps_1) * sizes.dilation_0)
                    s_1 = int32(int32(rest % sizes.taps_1) * sizes.dilation_1)
                    s_2 = int32(int32(tap % sizes.taps_2) * sizes.dilation_2)
                    shift_0[i], shift_1[i], shift_2[i] = s_0, s_1, s_2
                    s = int32(s_0 * sizes.step_0 + s_1 * sizes.step_1 + s_2 * sizes.step_2)
                    shift[i] = int32(s + int32(c // sizes.group_out))
                    totals[i] = zero
                n = first_case
                while n < end_case:
                    image = n * sizes.step_case
                    grad = (uint64(n) * sizes.locations + first_location) * c_out + uint64(c)
                    for i in range(EACH):
                        sums[i] = zero
                    o_0, o_1, o_2 = first_0, first_1, first_2
                    remaining = uint32(end_location - first_location)
                    while remaining > uint32(0):
                        i_0 = int32(int32(o_0) * sizes.stride_0 - sizes.before_0)
                        i_1 = int32(int32(o_1) * sizes.stride_1 - sizes.before_1)
                        i_2 = int32(int32(o_2) * sizes.stride_2 - sizes.before_2)
                        at = int32(i_0 * sizes.step_0 + i_1 * sizes.step_1 + i_2 * sizes.step_2)
                        right = out.dtype.type(grads[grad])
                        for i in range(EACH):
                            inside = uint32(first + i) < sizes.entries
                            inside &= uint32(i_0 + shift_0[i]) < sizes.size_0
                            inside &= uint32(i_1 + shift_1[i]) < sizes.size_1
                            inside &= uint32(i_2 + shift_2[i]) < sizes.size_2
                            pixel = uint64(image + int32(at + shift[i]))
                            value = images[pixel if inside else uint64(0)]
                            outside = out.dtype.type(uint32(first + i) == sizes.entries)
                            sums[i] += (out.dtype.type(value) if inside else outside) * right
                        remaining = uint32(remaining - uint32(1))
                        grad += uint64(c_out)
                        o_2 = uint32(o_2 + 1)
                        if o_2 == sizes.out_2:
                            o_1, o_2 = uint32(o_1 + 1), uint32(0)
                            if o_1 == sizes.out_1:
                                o_0, o_1 = uint32(o_0 + 1), uint32(0)
                    for i in range(EACH):
                        squares = sums[i] * sums[i]
                        totals[i] += squares if num_splits == uint32(1) else sums[i]
                    n += 1
                for i in range(EACH):
                    if first + i < num_rows:
                        out[uint64(item), uint64(first + i), uint64(c)] = totals[i]
                first = uint32(first + cuda.blockDim.y * EACH)
            c = uint32(c + cuda.gridDim.x * cuda.blockDim.x)
        item = uint32(item + cuda.gridDim.y)
