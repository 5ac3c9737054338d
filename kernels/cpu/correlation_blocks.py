"""Covariances of patches put together from correlations, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled

# Side of the squares in which a matrix is transposed: two of them fit the first cache.
_TILE = 32


def correlation_blocks(halves: Any, pairs: Any, blocks: Any, last: Any | None = None) -> Any:
    """See ``kfac_xp.patch_covariance.blocks.correlation_blocks``."""
    num_offsets, num_blocks, channels, _, _ = halves.shape
    width = num_blocks * channels
    correlations = np.empty((num_offsets, width, width), dtype=halves.dtype)
    _add_mirrored(halves.reshape(num_offsets, width, width), correlations)
    side = len(blocks) * channels + (last is not None)
    out = np.empty((side, side), dtype=halves.dtype)
    _gather(correlations, pairs, blocks, channels, out)
    if last is not None:
        out[-1, :] = out[:, -1] = last
    return out


@compiled
def _add_mirrored(halves, out):
    """``out[d] = halves[d] + halves[-d].T``, each sum once, for d and for -d."""
    num_offsets, width, _ = halves.shape
    for d in range((num_offsets + 1) // 2):
        mirror = num_offsets - 1 - d
        for r_0 in range(0, width, _TILE):
            r_1 = min(r_0 + _TILE, width)
            for c_0 in range(0, width, _TILE):
                c_1 = min(c_0 + _TILE, width)
                for r in range(r_0, r_1):
                    for c in range(c_0, c_1):
                        value = halves[d, r, c] + halves[mirror, c, r]
                        out[d, r, c] = value
                        out[mirror, c, r] = value


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
