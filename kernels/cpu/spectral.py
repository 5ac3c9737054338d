"""Correlations by the correlation theorem on the CPU: transforms, products, offsets, in the cache.

The steps of ``kfac_xp.patch_covariance.spectral``, each a sum of outer products. A block of a
result, `ROWS` rows by one vector of columns, is made in registers; the products of a frequency are
never in memory: blocks of some frequencies are multiplied with the phases while they are in the
cache. (Calls of BLAS would each be too small to be shared among threads.)

Channels fill whole vectors, and a panel is one vector of them for all cases. The order of every
sum depends on the shapes alone, not on the threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kfac_xp.kernels.cpu import scratch
from kfac_xp.kernels.cpu.blocks import (
    ROWS,
    VECTOR_BYTES,
    add_pair,
    lanes,
    padded,
    set_block,
    set_complex,
    set_pair,
)
from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.cpu.threads import run_in_parts

# Frequencies whose products are held at a time, a block of each. With fewer of them sums are read
# and written more often: 32 took 1.3 times as long.
_FREQUENCIES = 64
# Elements of lines that should stay in the first level of the cache.
_NEAR = 2**12
# Elements of transforms that should stay in the cache that the cores share. With fewer of them
# threads are started more often.
_CACHED = 2**21


def phased_correlations(images: Any, phases: Any, transforms: Sequence[Any], workspace: int) -> Any:
    """See ``kfac_xp.patch_covariance.spectral.phased_correlations``."""
    num_offsets, num_first, num_others = phases.shape
    num_cases, channels = images.shape[0], images.shape[-1]
    sums = scratch.empty((padded(num_offsets), channels, channels), images.dtype)
    if images.size == 0 or num_first * num_others == 0:
        sums[...] = 0
    # The same sizes as the reference's: lines of some first frequencies, parts of fewer.
    per_line = 2 * math.prod(images.shape[2:])
    per_part = 4 * num_others * channels
    budget = workspace // images.dtype.itemsize
    cases = max(1, min(num_cases, budget // (per_line + per_part)))
    chunk = max(1, min(num_first, budget // (per_line * cases)))
    inner = max(_CACHED // (per_part * cases), _FREQUENCIES // num_others)
    inner = max(1, min(inner, chunk, budget // (per_part * cases)))

    def add(lines: Any, weights: Any, first: int, group: int, begins: bool) -> None:
        """The frequencies from `first` on, whose lines are from `group` on."""
        matrix = transforms[-1]
        if len(transforms) == 1:  # its frequencies are the first, of one group
            matrix, group = matrix[2 * first : 2 * (first + len(weights))], 0
            weights = weights.swapaxes(0, 1)
        per_group = len(matrix) // 2
        group *= weights.shape[1] // per_group
        _add(
            lines,
            _transposed(matrix),
            weights.reshape(-1, per_group, weights.shape[2]),
            sums,
            group,
            begins,
        )

    with scratch.frame():
        weights = scratch.zeros((num_first, num_others, len(sums)), images.dtype)
        weights[:, :, :num_offsets] = phases.transpose(1, 2, 0)
        for start in range(0, num_cases, cases):
            part = np.ascontiguousarray(images[start : start + cases])
            for low in range(0, num_first, chunk):
                high = min(low + chunk, num_first)
                with scratch.frame():
                    lines = _lines(part, transforms, low, high)
                    for i in range(low, high, inner):
                        j = min(i + inner, high)
                        with scratch.frame():
                            add(lines, weights[i:j], i, i - low, start + i == 0)
    return sums[:num_offsets]


def _lines(images: Any, transforms: Sequence[Any], low: int, high: int) -> Any:
    """Everything but the last transform, of some first frequencies: [N, frequencies, size, C].

    Of one axis, whose transform is the last, that is the images themselves.
    """
    num_cases, size, *rest, channels = images.shape
    if not rest:
        return images[:, None, :, :]
    matrix = _transposed(transforms[0][2 * low : 2 * high])
    columns = math.prod(rest) * channels
    lines = scratch.empty((num_cases, matrix.shape[1], columns), images.dtype)
    flat = images.reshape(num_cases, size, columns)
    run_in_parts(
        lambda first, last: _transform_lines(matrix, flat, lines, first, last),
        count=columns // lanes(images.dtype),
        work=lines.size * size,
    )
    x = lines.reshape(num_cases, -1, 2, *rest, channels)
    for matrix in transforms[1:-1]:
        _, groups, _, length, *rest, _ = x.shape
        x = x.reshape(num_cases, groups, 2 * length, -1)
        x = np.matmul(matrix, x).reshape(num_cases, -1, 2, *rest, channels)
    return x.reshape(num_cases, x.shape[1], -1, channels)


def _add(lines: Any, matrix: Any, weights: Any, sums: Any, first_group: int, begins: bool) -> None:
    """Transform lines to panels, and add the products of their frequencies.

    Parameters
    ----------
    lines : shape [N, more groups, length, C]
    matrix : shape [length, (frequency, part) padded]
    weights : shape [groups, frequencies of a group, offsets padded]
    sums : shape [offsets padded, C, C]
    first_group
        Which of the lines' groups is the first.
    begins
        Whether the sums are written in place of being added to.
    """
    groups, others, num_offsets = weights.shape
    num_cases, _, _, channels = lines.shape
    width = lanes(lines.dtype)
    shape = (groups * others, channels // width, 2 * num_cases, width)
    parts, rotated = (scratch.empty(shape, lines.dtype) for _ in range(2))
    run_in_parts(
        lambda first, last: _transform_panels(
            matrix, lines, first_group, groups, others, parts, rotated, first, last
        ),
        count=shape[1],
        work=groups * matrix.size * num_cases * channels,
    )
    weights = weights.reshape(-1, num_offsets)
    run_in_parts(
        lambda first, last: _add_products(parts, rotated, weights, sums, begins, first, last),
        count=channels // ROWS,
        work=len(weights) * (2 * num_cases + num_offsets) * channels**2,
    )


def _transposed(matrix: Any) -> Any:
    """[columns, rows], rows filled up with zeros to whole blocks."""
    out = np.zeros((matrix.shape[1], padded(matrix.shape[0])), dtype=matrix.dtype)
    out[:, : matrix.shape[0]] = matrix.T
    return out


@compiled
def _transform_lines(matrix, images, out, first, last):
    """``out[n, f] = sum_y matrix[y, f] images[n, y]`` for the vectors of columns `first` to `last`.

    `matrix` is [size, frequencies padded], `images` [N, size, columns], `out` [N, frequencies
    padded, columns].
    """
    num_cases, size, columns = images.shape
    rows, width = matrix.shape[1], VECTOR_BYTES // matrix.itemsize
    for n in range(num_cases):
        for v in range(first, last, 2):
            start, to = n * size * columns + v * width, n * rows * columns + v * width
            for r in range(0, rows, ROWS):
                if v + 1 < last:
                    set_pair(
                        *(matrix, r, rows, images, start, width, columns, size),
                        *(out, to + r * columns, width, columns),
                    )
                else:
                    set_block(
                        *(matrix, r, rows, images, start, columns, size),
                        *(out, to + r * columns, columns),
                    )


@compiled
def _transform_panels(matrix, lines, first_group, groups, others, parts, rotated, first, last):
    """The last transform, for the panels `first` to `last`: parts A, B and rotated A + B, B - A.

    `matrix` is [length, (frequency, part) padded], `lines` [N, more groups, length, C]; `parts`
    and `rotated` are [groups * others, panels, (part, n), width].
    """
    num_cases, all_groups, length, channels = lines.shape
    panels, width = parts.shape[1], parts.shape[3]
    # Consecutive cases are written side by side; so many of them as stay in the first level.
    some = max(1, _NEAR // (length * width))
    of_panel = 2 * num_cases * width
    for group in range(groups):
        for panel in range(first, last):
            for n_0 in range(0, num_cases, some):
                for r in range(0, matrix.shape[1], ROWS):
                    f = group * others + r // 2
                    for n in range(n_0, min(n_0 + some, num_cases)):
                        line = (n * all_groups + first_group + group) * length * channels
                        set_complex(
                            *(matrix, r, matrix.shape[1], lines, line + panel * width, channels),
                            *(length, parts, rotated, (f * panels + panel) * of_panel + n * width),
                            *(panels * of_panel, num_cases * width, others - r // 2),
                        )


@compiled
def _add_products(parts, rotated, weights, sums, begins, first, last):
    """``sums[d] += sum_f weights[f, d] parts[f]^T rotated[f]`` for the blocks `first` to `last`.

    Blocks are of rows of the sums [offsets padded, C, C]; `weights` is [F, offsets padded], the
    others [F, panels, K, width]. With `begins` the sums are written, whatever they hold.
    """
    num_frequencies, panels, size, width = parts.shape
    num_offsets, channels, _ = sums.shape
    # Of two panels, each [frequency, row, column].
    products = np.empty((2, _FREQUENCIES, ROWS, width), parts.dtype)
    step, of_panel = panels * size * width, _FREQUENCIES * ROWS * width
    for begin in range(0, num_frequencies, _FREQUENCIES):
        count = min(_FREQUENCIES, num_frequencies - begin)
        for block in range(first, last):
            row = block * ROWS
            left = (row // width) * size * width + row % width
            for panel in range(0, panels, 2):
                together = min(2, panels - panel)
                for f in range(count):
                    start = (begin + f) * step
                    right = start + panel * size * width
                    if together == 2:
                        set_pair(
                            *(parts, start + left, width, rotated, right, size * width, width),
                            *(size, products, f * ROWS * width, of_panel, width),
                        )
                    else:
                        set_block(
                            *(parts, start + left, width, rotated, right, width),
                            *(size, products, f * ROWS * width, width),
                        )
                for d in range(0, num_offsets, ROWS):
                    for p in range(together):
                        for r in range(0, ROWS, 2):
                            at = (d * channels + row + r) * channels + (panel + p) * width
                            # Not in a variable: a tuple counts references to its arrays, and
                            # the threads would wait for each other's counts.
                            if begins and begin == 0:
                                set_pair(
                                    *(weights, begin * num_offsets + d, num_offsets, products),
                                    *(p * of_panel + r * width, width, ROWS * width, count),
                                    *(sums, at, channels, channels * channels),
                                )
                            else:
                                add_pair(
                                    *(weights, begin * num_offsets + d, num_offsets, products),
                                    *(p * of_panel + r * width, width, ROWS * width, count),
                                    *(sums, at, channels, channels * channels),
                                )
