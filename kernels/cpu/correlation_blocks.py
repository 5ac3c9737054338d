"""Covariances of patches put together from correlations, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.cpu.threads import run_in_parts

# Side of the squares in which a matrix is transposed: one of them fits the first cache.
_TILE = 64
# Multiply-adds that take as long as moving an element.
_WORK = 16
# Parts of filters with one, two and three axes, at most. Kernels take as many, and so compile for
# few lengths of their tuple.
_NUM_PARTS = (1, 3, 9, 27)


def correlation_blocks(
    halves: Any, layout: Any, borders: Sequence[Any] = (), last: Any | None = None
) -> Any:
    """See ``kfac_xp.patch_covariance.blocks.correlation_blocks``."""
    channels = halves.shape[2]
    parts = tuple(
        part.reshape(len(part), part.shape[1] * channels, -1) for part in (halves, *borders)
    )
    size = sum(part.size for part in parts)
    none = np.empty((0, 0, 0), dtype=halves.dtype)
    num_parts = next((n for n in _NUM_PARTS if n >= len(parts)), len(parts))
    parts += (none,) * (num_parts - len(parts))
    run_in_parts(lambda first, end: _add_mirrored(parts, first, end), count=size, work=size * _WORK)
    num_rows = layout.blocks.shape[1] * channels
    side = num_rows + (last is not None)
    out = np.empty((side, side), dtype=halves.dtype)
    run_in_parts(
        lambda first, end: _gather(parts, layout.pairs, layout.blocks, channels, out, first, end),
        count=num_rows,
        work=out.size * _WORK,
    )
    if last is not None:
        out[-1, :] = out[:, -1] = last
    return out


@compiled
def _add_mirrored(parts, first, last):
    """In place, ``halves[d] + halves[-d].T`` for all parts and offsets: each sum once, for both.

    Of all elements in a row, those of an offset and its opposite are done if the first of them is
    between `first` and `last`.
    """
    at = 0
    for part in range(len(parts)):
        halves = parts[part]
        num_offsets, width, _ = halves.shape
        for d in range((num_offsets + 1) // 2):
            mirror = num_offsets - 1 - d
            if first <= at < last:
                _add_mirror_images(halves, d, mirror)
            at += (1 if d == mirror else 2) * width**2


@compiled
def _add_mirror_images(halves, d, mirror):
    """In place, ``halves[d] + halves[mirror].T`` for both.

    Squares are transposed in a buffer, so that memory is read and written along rows only. The
    buffer's rows are one longer than they need be: a column of it then lies in many cache sets.
    """
    width = halves.shape[1]
    square = np.empty((_TILE, _TILE + 1), halves.dtype)
    for r_0 in range(0, width, _TILE):
        rows = np.uintp(min(_TILE, width - r_0))
        # The offset in the middle is its own mirror image: its squares come in pairs.
        for c_0 in range(r_0 if d == mirror else 0, width, _TILE):
            columns = np.uintp(min(_TILE, width - c_0))
            row, column = np.uintp(r_0), np.uintp(c_0)
            for c in range(columns):
                for r in range(rows):
                    square[c, r] = halves[mirror, column + c, row + r]
            for r in range(rows):
                for c in range(columns):
                    value = halves[d, row + r, column + c] + square[c, r]
                    halves[d, row + r, column + c] = value
                    square[c, r] = value
            for c in range(columns):
                for r in range(rows):
                    halves[mirror, column + c, row + r] = square[c, r]


@compiled
def _gather(parts, pairs, blocks, channels, out, first, last):
    """Write the rows `first` to `last` of `out`, but for the columns that belong to no tap.

    A row is put together from all `parts` while it is in the cache.
    """
    num_taps = blocks.shape[1]
    for row in range(np.uintp(first), np.uintp(last)):
        t, c = row // np.uintp(channels), row % np.uintp(channels)
        for part in range(len(blocks)):
            if blocks[part, t] < 0:
                continue
            correlations = parts[part]
            source = np.uintp(blocks[part, t] * channels) + c
            for u in range(num_taps):
                if blocks[part, u] < 0:
                    continue
                d = np.uintp(pairs[part, t, u])
                first_in, first_out = np.uintp(blocks[part, u] * channels), np.uintp(u * channels)
                if part == 0:
                    for e in range(np.uintp(channels)):
                        out[row, first_out + e] = correlations[d, source, first_in + e]
                else:
                    for e in range(np.uintp(channels)):
                        out[row, first_out + e] += correlations[d, source, first_in + e]
