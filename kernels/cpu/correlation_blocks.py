"""Covariances of patches put together from correlations, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.cpu.threads import run_in_parts

# Side of the squares in which a matrix is transposed: one of them fits the first cache.
_TILE = 64
# Multiply-adds that take as long as moving an element.
_WORK = 16


def correlation_blocks(halves: Any, pairs: Any, blocks: Any, last: Any | None = None) -> Any:
    """See ``kfac_xp.patch_covariance.blocks.correlation_blocks``."""
    num_offsets, num_blocks, channels, _, _ = halves.shape
    width = num_blocks * channels
    correlations = halves.reshape(num_offsets, width, width)
    run_in_parts(
        lambda first, last: _add_mirrored(correlations, first, last),
        count=(num_offsets + 1) // 2,
        work=correlations.size * _WORK,
    )
    side = len(blocks) * channels + (last is not None)
    out = np.empty((side, side), dtype=halves.dtype)
    run_in_parts(
        lambda first, last: _gather(correlations, pairs, blocks, channels, out, first, last),
        count=len(blocks) * channels,
        work=out.size * _WORK,
    )
    if last is not None:
        out[-1, :] = out[:, -1] = last
    return out


@compiled
def _add_mirrored(halves, first, last):
    """In place, ``halves[d] + halves[-d].T``: each sum once, for d from `first` on and for -d.

    Squares are transposed in a buffer, so that memory is read and written along rows only. The
    buffer's rows are one longer than they need be: a column of it then lies in many cache sets.
    """
    num_offsets, width, _ = halves.shape
    square = np.empty((_TILE, _TILE + 1), halves.dtype)
    for d in range(first, last):
        mirror = num_offsets - 1 - d
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
def _gather(correlations, pairs, blocks, channels, out, first, last):
    """Write the rows `first` to `last` of `out`, but for the columns that belong to no tap."""
    num_taps = blocks.shape[0]
    for row in range(np.uintp(first), np.uintp(last)):
        t, c = row // np.uintp(channels), row % np.uintp(channels)
        source = np.uintp(blocks[t] * channels) + c
        for u in range(num_taps):
            d = np.uintp(pairs[t, u])
            first_in, first_out = np.uintp(blocks[u] * channels), np.uintp(u * channels)
            for e in range(np.uintp(channels)):
                out[row, first_out + e] = correlations[d, source, first_in + e]
