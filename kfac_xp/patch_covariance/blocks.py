"""From correlations at offsets to the second moment of patches, block by block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kfac_xp.backend import (
    UNMEASURED,
    Condition,
    KernelOp,
    array_namespace,
    is_one_float,
    kept_like,
)
from kfac_xp.linalg import add_at, bordered
from kfac_xp.patch_covariance.borders import borders_of
from kfac_xp.patch_covariance.lattice import TapGrid
from kfac_xp.typing import Array


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Which correlations make up the block of two taps: integers, on the host.

    Parameters
    ----------
    shape
        Number of taps along each axis of the filter; T in all.
    pairs : shape [parts, T, T]
        For each part of the sum, which of its offsets lies between two taps.
    blocks : shape [parts, T]
        Which of its blocks of channels a tap reads; -1 if it takes no part. The taps of a part are
        those within some bounds along each axis.
    """

    shape: tuple[int, ...]
    pairs: np.ndarray
    blocks: np.ndarray


@KernelOp
def correlation_blocks(
    halves: Array, layout: BlockLayout, borders: Sequence[Array] = (), last: Array | None = None
) -> Array:
    """The matrix whose block (t, u) is a sum of correlations, one of each part.

    ``out[(t, c), (u, e)] = sum_p R_p[pairs[p, t, u], blocks[p, t], c, blocks[p, u], e]``, over the
    parts p that both taps take part in, where R[d] is ``halves[d] + halves[-d]^T`` as matrices of
    ``(block, c)``.

    Parameters
    ----------
    halves : shape [offsets, B, C, B, C]
        The first part, which all taps take part in. The last offset is minus the first, and so
        on: d and -d are mirror images. Given away, as are `borders`: a kernel overwrites them.
    layout
        The taps, and what they read.
    borders
        The other parts, each with offsets and blocks of its own.
    last : shape [T * C + 1], optional
        A last row, and column, to append.

    Returns
    -------
    Array of shape [T * C (+ 1), T * C (+ 1)], symmetric.
    """
    xp = array_namespace(halves, *borders)
    channels = halves.shape[2]
    width = len(layout.blocks[0]) * channels
    by_tap = xp.reshape(_part(halves, layout, 0), (*layout.shape, channels) * 2)
    for part, border in enumerate(borders, start=1):
        taps = np.argwhere(layout.blocks[part].reshape(layout.shape) >= 0)
        within = [
            slice(int(low), int(high) + 1)
            for low, high in zip(taps.min(axis=0), taps.max(axis=0), strict=True)
        ]
        index = (*within, slice(None)) * 2
        sizes = tuple(cut.stop - cut.start for cut in within)
        added = xp.reshape(_part(border, layout, part), (*sizes, channels) * 2)
        by_tap = add_at(by_tap, index, added)
    matrix = xp.reshape(by_tap, (width, width))
    return matrix if last is None else bordered(matrix, last)


def _part(halves: Array, layout: BlockLayout, part: int) -> Array:
    """The blocks [t, c, u, e] of one part, for the taps that take part in it."""
    xp = array_namespace(halves)
    num_offsets, num_blocks, channels, _, _ = halves.shape
    mirrored = xp.permute_dims(xp.flip(halves, axis=0), (0, 3, 4, 1, 2))
    by_block = xp.permute_dims(halves + mirrored, (0, 1, 3, 2, 4))
    by_block = xp.reshape(by_block, (num_offsets * num_blocks**2, channels, channels))
    (index,) = _numbers(halves, layout, part, num_blocks)
    (num_taps,) = np.nonzero(layout.blocks[part] >= 0)[0].shape
    taken = xp.take(by_block, index, axis=0)
    taken = xp.reshape(taken, (num_taps, num_taps, channels, channels))
    return xp.permute_dims(taken, (0, 2, 1, 3))


@kept_like
def _numbers(layout: BlockLayout, part: int, num_blocks: int) -> tuple[np.ndarray]:
    """For all pairs of taps of a part, which of its blocks [offsets * B * B] theirs is."""
    (taps,) = np.nonzero(layout.blocks[part] >= 0)
    blocks = layout.blocks[part][taps]
    pairs = layout.pairs[part][np.ix_(taps, taps)]
    return (((pairs * num_blocks + blocks[:, None]) * num_blocks + blocks).reshape(-1),)


@functools.lru_cache(maxsize=256)
def layout_of(grid: TapGrid) -> BlockLayout:
    """The layout of a filter's taps: the whole images, and then their borders.

    Offsets are in row-major order of each axis's `offsets`.
    """
    borders = borders_of(grid)
    edge_axes = [(), *({edge.axis for edge in border.edges} for border in borders)]
    pairs = np.zeros((len(edge_axes), grid.num_taps, grid.num_taps), dtype=np.int64)
    taps = np.indices(grid.shape).reshape(len(grid.shape), -1)
    for i, axis in enumerate(grid.axes):
        offsets, shifts = np.array(axis.offsets), np.array(axis.shifts)[taps[i]]
        number = np.searchsorted(offsets, shifts[None, :] - shifts[:, None])
        for own, part in zip(pairs, edge_axes, strict=True):
            if i not in part:
                own *= len(offsets)
                own += number
    blocks = np.array([grid.blocks, *(border.blocks for border in borders)], dtype=np.int64)
    return BlockLayout(grid.shape, pairs, blocks)


correlation_blocks.register(
    "numba",
    "kfac_xp.kernels.cpu.correlation_blocks:correlation_blocks",
    accepts=Condition(
        "float32 or float64",
        lambda halves, *_, **__: is_one_float(halves),
    ),
)
correlation_blocks.register(
    "cuda",
    "kfac_xp.kernels.cuda.correlation_blocks:correlation_blocks",
    accepts=Condition(
        "arrays that are all float32 or all float64",
        lambda halves, layout, borders=(), last=None: is_one_float(halves, *borders, last),
    ),
    wins=UNMEASURED,
)
