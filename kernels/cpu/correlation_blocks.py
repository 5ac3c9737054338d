"""Covariances of patches put together from correlations, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled

# Side of the squares in which a matrix is transposed: one of them fits the first cache.
_TILE = 64


def correlation_blocks(halves: Any, pairs: Any, blocks: Any, last: Any | None = None) -> Any:
    """See ``kfac_xp.patch_covariance.blocks.correlation_blocks``."""
    num_offsets, num_blocks, channels, _, _ = halves.shape
    width = num_blocks * channels
    correlations = halves.reshape(num_offsets, width, width)
    _add_mirrored(correlations)
    side = len(blocks) * channels + (last is not None)
    out = np.empty((side, side), dtype=halves.dtype)
    _gather(correlations, pairs, blocks, channels, out)
    if last is not None:
        out[-1, :] = out[:, -1] = last
    return out


@compiled
def _add_mirrored(halves):
    """In place, ``halves[d] + halves[-d].T``: each sum once, for d and for -d.

    Squares are transposed in a buffer, so that memory is read and written along rows only. The
    buffer's rows are one longer than they need be: a column of it then lies in many cache sets.
    """
    num_offsets, width, _ = halves.shape
    square = np.empty((_TILE, _TILE + 1), halves.dtype)
    for d in range((num_offsets + 1) // 2):
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
def _gather(correlations, pairs, blocks, channels, out):
    """Write the rows and columns of `out` that belong to taps, row by row."""
    num_taps = blocks.shape[0]
    for t in range(num_taps):
        for c in range(channels):
            row = np.uintp(t * channels + c)
            source = np.uintp(blocks[t] * channels + c)
            for u in range(num_taps):
                d = np.uintp(pairs[t, u])
                first_in, first_out = np.uintp(blocks[u] * channels), np.uintp(u * channels)
                for e in range(np.uintp(channels)):
                    out[row, first_out + e] = correlations[d, source, first_in + e]
