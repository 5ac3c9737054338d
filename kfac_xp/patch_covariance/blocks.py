"""From correlations at offsets to the second moment of patches, block by block."""

from __future__ import annotations

import functools

import numpy as np

from kfac_xp.backend import Condition, KernelOp, array_namespace, device_of, is_one_float
from kfac_xp.linalg import bordered
from kfac_xp.patch_covariance.lattice import TapGrid
from kfac_xp.typing import Array


@KernelOp
def correlation_blocks(
    halves: Array, pairs: np.ndarray, blocks: np.ndarray, last: Array | None = None
) -> Array:
    """The matrix whose block (t, u) is the correlation at the offset between taps t and u.

    ``out[(t, c), (u, e)] = R[pairs[t, u], blocks[t], c, blocks[u], e]``, where R[d] is
    ``halves[d] + halves[-d]^T`` as matrices of ``(block, c)``.

    Parameters
    ----------
    halves : shape [offsets, B, C, B, C]
        The last offset is minus the first, and so on: d and -d are mirror images. Given away: a
        kernel overwrites it.
    pairs : integers of shape [T, T], on the host
        Which offset lies between two taps.
    blocks : integers of shape [T], on the host
        Which of the B blocks of channels a tap reads.
    last : shape [T * C + 1], optional
        A last row, and column, to append.

    Returns
    -------
    Array of shape [T * C (+ 1), T * C (+ 1)], symmetric.
    """
    xp = array_namespace(halves)
    num_offsets, num_blocks, channels, _, _ = halves.shape
    mirrored = xp.permute_dims(xp.flip(halves, axis=0), (0, 3, 4, 1, 2))
    by_block = xp.permute_dims(halves + mirrored, (0, 1, 3, 2, 4))
    by_block = xp.reshape(by_block, (num_offsets * num_blocks**2, channels, channels))
    index = (pairs * num_blocks + blocks[:, None]) * num_blocks + blocks[None, :]
    index = xp.asarray(index.reshape(-1), device=device_of(halves))
    taken = xp.reshape(xp.take(by_block, index, axis=0), (*pairs.shape, channels, channels))
    width = len(blocks) * channels
    matrix = xp.reshape(xp.permute_dims(taken, (0, 2, 1, 3)), (width, width))
    return matrix if last is None else bordered(matrix, last)


@functools.lru_cache(maxsize=256)
def tap_pairs(grid: TapGrid) -> tuple[np.ndarray, np.ndarray]:
    """`pairs` and `blocks` of a filter, for offsets in row-major order of each axis's `offsets`."""
    pairs = np.zeros((grid.num_taps,) * 2, dtype=np.int64)
    for axis, shifts in zip(grid.axes, zip(*grid.shifts, strict=True), strict=True):
        offsets = np.array(axis.offsets)
        difference = np.array(shifts)[None, :] - np.array(shifts)[:, None]
        pairs = pairs * len(offsets) + np.searchsorted(offsets, difference)
    return pairs, np.array(grid.blocks, dtype=np.int64)


correlation_blocks.register(
    "numba",
    "kfac_xp.kernels.cpu.correlation_blocks:correlation_blocks",
    accepts=Condition(
        "float32 or float64",
        lambda halves, pairs, blocks, last=None: is_one_float(halves),
    ),
)
