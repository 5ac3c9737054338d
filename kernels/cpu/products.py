"""Squares of the matrix products of many cases, added up: the arithmetic of the diagonal factors.

A product of one case is small: a call of BLAS per case spends much of its time on preparing, and
its result goes to memory only to be squared. Here a block of a case's product (`ROWS` rows by one
vector of columns) is made in registers, squared there and added to the sum. Its rows are read from
the images themselves, so that patches do not exist.

The sums over locations and cases are taken in an order that depends on the shapes alone, so the
bits of the result do not depend on how the rows are split among threads.
"""

from __future__ import annotations

import numpy as np

from kfac_xp.kernels.cpu.blocks import (
    ROWS,
    add_listed_block,
    add_listed_pair,
    add_listed_square,
    add_squared_pair,
)
from kfac_xp.kernels.cpu.jit import compiled

# Locations after which a sum over them is set aside: what is read meanwhile, a cache line each of
# image and gradients, stays in the first level of the cache from one vector of columns to the
# next, and rounding errors grow with the number of spans rather than of locations.
_SPAN = 256
# Up to so many locations those where a filter tap reads padding are left out of the sums; with
# more they are too few to be worth the list of the others.
_FEW_LOCATIONS = 256
# Blocks of rows up to which gradients are read where they lie.
_FEW_BLOCKS = 8


@compiled
def add_squares(images, grads, axes, out, first, last, cases_in_chunk):
    """``out += sum_n (patches[n]^T grads[n]) ** 2`` for the blocks `first` to `last` of rows.

    `images` is [N, space_0, space_1, space_2, C], `grads` [N, T, C_out] with at least one
    location; `axes` are those of `ThreeAxes`. `out` is [blocks, panels, ROWS, lanes]: rows padded
    to whole blocks, columns to whole vectors.

    What is copied, images into a border of zeros and gradients into panels of vectors, is copied
    for `cases_in_chunk` cases at a time.
    """
    space, _, kernel, _, _, _, padded = axes
    num_cases, num_locations, c_out = grads.shape
    channels = images.shape[4]
    _, panels, _, width = out.shape
    num_rows = kernel[0] * kernel[1] * kernel[2] * channels
    image_size = padded[0] * padded[1] * padded[2] * channels
    is_bordered = space != padded
    bordered = np.zeros(cases_in_chunk * image_size if is_bordered else 0, images.dtype)
    pixels = bordered if is_bordered else images.reshape(-1)
    # Panels are worth a copy if many rows read them, or to fill up the last vector.
    is_packed = c_out % width != 0 or last - first > _FEW_BLOCKS
    grads_size = panels * num_locations * width
    packed = np.zeros(cases_in_chunk * grads_size if is_packed else 0, images.dtype)
    vectors = packed if is_packed else grads.reshape(-1)
    panel, step = (num_locations * width, width) if is_packed else (width, c_out)
    sums = np.zeros((panels, ROWS, width), images.dtype)
    rows = np.empty(ROWS, np.intp)
    positions = np.empty(num_locations, np.intp)
    places = np.empty(num_locations, np.intp)
    for start in range(0, num_cases, cases_in_chunk):
        count = min(cases_in_chunk, num_cases - start)
        image_start, grads_start = start * image_size, start * grads_size
        if is_bordered:
            image_start = 0
            _copy_images(images[start : start + count], axes, bordered, 1)
        if is_packed:
            grads_start = 0
            _copy_grads(grads[start : start + count], panels, width, packed)
        listed, hits = (-1, -1), 0
        for block in range(first, last):
            end = min(block * ROWS + ROWS, num_rows)
            # Rows beyond the last repeat it: they are computed, and dropped in the end.
            for r in range(ROWS):
                rows[r] = _row_offset(min(block * ROWS + r, end - 1), channels, axes)
            taps = (block * ROWS // channels, (end - 1) // channels + 1)
            if num_locations > _FEW_LOCATIONS:
                taps = (0, kernel[0] * kernel[1] * kernel[2])
            if taps != listed:
                listed = taps
                hits = _list_locations(taps, channels, axes, step, positions, places)
            if hits == 0:
                continue
            for n in range(count):
                image, case = image_start + n * image_size, grads_start + n * grads_size
                at = block * panels * ROWS * width
                # Arguments are not kept in a variable: a tuple counts references to its arrays,
                # and the threads would wait for each other's counts.
                if hits <= _SPAN:
                    for p in range(0, panels - 1, 2):
                        add_squared_pair(
                            *(pixels, image, rows, positions, places, 0, hits),
                            *(vectors, case + p * panel, panel, out, at + p * ROWS * width),
                        )
                    if panels % 2:
                        p = panels - 1
                        add_listed_square(
                            *(pixels, image, rows, positions, places, 0, hits),
                            *(vectors, case + p * panel, panel, out, at + p * ROWS * width),
                        )
                    continue
                for begin in range(0, hits, _SPAN):
                    stop = min(begin + _SPAN, hits)
                    for p in range(0, panels - 1, 2):
                        add_listed_pair(
                            *(pixels, image, rows, positions, places, begin, stop),
                            *(vectors, case + p * panel, panel, sums, p * ROWS * width),
                        )
                    if panels % 2:
                        p = panels - 1
                        add_listed_block(
                            *(pixels, image, rows, positions, places, begin, stop),
                            *(vectors, case + p * panel, panel, sums, p * ROWS * width),
                        )
                for p in range(panels):
                    for r in range(ROWS):
                        for c in range(width):
                            out[block, p, r, c] += sums[p, r, c] * sums[p, r, c]
                            sums[p, r, c] = 0


@compiled
def add_depthwise_squares(images, grads, axes, out, first, last, cases_in_chunk):
    """``out[tap, c] += sum_n (sum_t patches[n, t, tap, c // M] * grads[n, t, c]) ** 2``.

    For the taps `first` to `last`; `images` is [N, space_0, space_1, space_2, C], `grads`
    [N, T, C * M] with at least one location, `out` [taps, C * M]. As in `add_squares`, images are
    copied `cases_in_chunk` at a time.
    """
    padded = axes[6]
    num_cases, num_locations, c_out = grads.shape
    image_size = padded[0] * padded[1] * padded[2] * c_out
    bordered = np.zeros(cases_in_chunk * image_size, images.dtype)
    sums, totals = np.empty(c_out, images.dtype), np.empty(c_out, images.dtype)
    positions = np.empty(num_locations, np.intp)
    places = np.empty(num_locations, np.intp)
    for start in range(0, num_cases, cases_in_chunk):
        count = min(cases_in_chunk, num_cases - start)
        _copy_images(images[start : start + count], axes, bordered, c_out // images.shape[4])
        for tap in range(first, last):
            hits = _list_locations((tap, tap + 1), c_out, axes, 1, positions, places)
            offset = _row_offset(tap * c_out, c_out, axes)
            for n in range(count):
                totals[:] = 0
                for begin in range(0, hits, _SPAN):
                    sums[:] = 0
                    for i in range(begin, min(begin + _SPAN, hits)):
                        grad = grads[start + n, places[i]]
                        corner = np.uintp(n * image_size + positions[i] + offset)
                        for c in range(np.uintp(c_out)):
                            sums[c] += bordered[corner + c] * grad[c]
                    for c in range(np.uintp(c_out)):
                        totals[c] += sums[c]
                for c in range(np.uintp(c_out)):
                    out[tap, c] += totals[c] * totals[c]


@compiled
def add_squares_of_sums(grads, out):
    """``out += sum_n (sum_t grads[n, t]) ** 2``: the row of a bias, whose patches are all 1."""
    num_cases, num_locations, c_out = grads.shape
    sums, totals = np.empty(c_out, grads.dtype), np.empty(c_out, grads.dtype)
    for n in range(num_cases):
        totals[:] = 0
        for begin in range(0, num_locations, _SPAN):
            sums[:] = 0
            for t in range(begin, min(begin + _SPAN, num_locations)):
                grad = grads[n, t]
                for c in range(np.uintp(c_out)):
                    sums[c] += grad[c]
            for c in range(np.uintp(c_out)):
                totals[c] += sums[c]
        for c in range(np.uintp(c_out)):
            out[c] += totals[c] * totals[c]


@compiled
def _copy_images(images, axes, bordered, times):
    """Copy images [n, space_0, space_1, space_2, C] to the inside of flat bordered ones.

    Each channel is written so many times, one beside the other.
    """
    num_cases, size_0, size_1, size_2, channels = images.shape
    before, padded = axes[5], axes[6]
    source = images.reshape(-1)
    run = np.uintp(size_2 * channels)
    from_ = np.uintp(0)
    for n in range(num_cases):
        for i_0 in range(size_0):
            for i_1 in range(size_1):
                line = (n * padded[0] + before[0] + i_0) * padded[1] + before[1] + i_1
                to = np.uintp((line * padded[2] + before[2]) * channels * times)
                if times == 1:
                    for j in range(run):
                        bordered[to + j] = source[from_ + j]
                else:
                    for j in range(run):
                        for copy in range(np.uintp(times)):
                            bordered[to + j * np.uintp(times) + copy] = source[from_ + j]
                from_ += run


@compiled
def _copy_grads(grads, panels, width, packed):
    """Copy gradients [n, T, C_out] to panels [n, panels, T, width], flat; the rest stays zero."""
    num_cases, num_locations, c_out = grads.shape
    to = np.uintp(0)
    for n in range(num_cases):
        for p in range(panels):
            first = np.uintp(p * width)
            count = np.uintp(min(width, c_out - p * width))
            for t in range(num_locations):
                for c in range(count):
                    packed[to + c] = grads[n, t, first + c]
                to += np.uintp(width)


@compiled
def _row_offset(row, channels, axes):
    """Where a row of patches begins, relative to the patch, in a bordered image."""
    _, _, kernel, _, dilation, _, padded = axes
    tap = row // channels
    tap_0 = tap // (kernel[1] * kernel[2]) * dilation[0]
    tap_1 = tap // kernel[2] % kernel[1] * dilation[1]
    tap_2 = tap % kernel[2] * dilation[2]
    return ((tap_0 * padded[1] + tap_1) * padded[2] + tap_2) * channels + row % channels


@compiled
def _list_locations(taps, channels, axes, step, positions, places):
    """List the locations where one of the taps meets a pixel, and return their number.

    `positions` are where their patches begin in a bordered image, `places` are their numbers times
    `step`. All are listed if there are many: the few at the border are not worth it.
    """
    space, out, kernel, strides, dilation, before, padded = axes
    is_short = out[0] * out[1] * out[2] <= _FEW_LOCATIONS
    t, hits = 0, 0
    for o_0 in range(out[0]):
        for o_1 in range(out[1]):
            line = (o_0 * strides[0] * padded[1] + o_1 * strides[1]) * padded[2]
            for o_2 in range(out[2]):
                hit = not is_short
                tap = taps[0]
                while tap < taps[1] and not hit:
                    tap_0 = tap // (kernel[1] * kernel[2]) * dilation[0]
                    tap_1 = tap // kernel[2] % kernel[1] * dilation[1]
                    tap_2 = tap % kernel[2] * dilation[2]
                    hit = (
                        0 <= o_0 * strides[0] + tap_0 - before[0] < space[0]
                        and 0 <= o_1 * strides[1] + tap_1 - before[1] < space[1]
                        and 0 <= o_2 * strides[2] + tap_2 - before[2] < space[2]
                    )
                    tap += 1
                if hit:
                    positions[hits] = (line + o_2 * strides[2]) * channels
                    places[hits] = t * step
                    hits += 1
                t += 1
    return hits
