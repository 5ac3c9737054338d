"""What correlations over all locations count too much: the locations outside the window.

Along one axis these lie before the window or behind it. From the last location before it, the tap
with the largest shift reads the position that lies farthest inside; from one location further out
every tap reads one position less far. So taps i and j read, from all these locations together,

    sum_l  x[m_i + l] x[m_j + l]^T,

where x[0], x[1], ... are the positions from the innermost outwards, zero beyond the image, and tap
i begins m_i behind the innermost: a sum along a diagonal of the correlations of a few lines of the
image. Dilation leaves positions between those that a location reads; lines are then taken apart
by residue, and residues are as good as more cases.

Several axes at once are the corners of the images, which the borders of each axis count once too
often: inclusion and exclusion,

    window = sum over sets S of axes of (-1)^|S| (outside along S, everywhere along the others).

For the axes of S a block depends on both taps, for the others on their offset alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from kfac_xp.backend import array_namespace
from kfac_xp.linalg import add_at, pad_with_zeros
from kfac_xp.patch_covariance.lattice import Axis, TapGrid
from kfac_xp.typing import Array


@dataclass(frozen=True)
class Edge:
    """The lines of an image that are read from the locations beyond one end of a window.

    Parameters
    ----------
    axis
        Index of the axis among the images'.
    start, stop
        The positions that hold them.
    before, after
        How many zeros to add, so that they are `lines` times `spacing` positions.
    from_the_end
        Whether the innermost position is the last one.
    lines
        Number of positions of one residue.
    spacing
        Number of residues.
    beginnings
        For each tap along the axis, at which line it begins, from the innermost; at `lines` or
        later if it reads nothing.
    """

    axis: int
    start: int
    stop: int
    before: int
    after: int
    from_the_end: bool
    lines: int
    spacing: int
    beginnings: tuple[int, ...]

    @property
    def cut(self) -> slice:
        """The positions."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Border:
    """The outside along the axes of some edges, everywhere along the other axes.

    Parameters
    ----------
    edges
        By ascending axis; at least one.
    sign
        With which it enters the window's sum.
    others
        The axes that have no edge here.
    num_blocks
        Blocks of `images`: one line along each edge's axis, and one block of the images.
    blocks
        For each tap of the filter, the block that it reads; -1 if it reads nothing.
    """

    edges: tuple[Edge, ...]
    sign: int
    others: tuple[Axis, ...]
    num_blocks: int
    blocks: tuple[int, ...]

    def images(self, images: Array) -> Array:
        """The border [N * residues, *sizes of the other axes, blocks, C] of images.

        `images` is [N, *sizes, blocks, C].
        """
        xp = array_namespace(images)
        index: list[slice] = [slice(None)] * len(images.shape)
        pads = [(0, 0)] * (len(images.shape) - 1)
        for edge in self.edges:
            index[edge.axis + 1] = edge.cut
            pads[edge.axis] = edge.before, edge.after
        lines = pad_with_zeros(images[tuple(index)], pads)
        flipped = tuple(edge.axis + 1 for edge in self.edges if edge.from_the_end)
        lines = xp.flip(lines, axis=flipped) if flipped else lines
        shape = list(lines.shape)
        for edge in reversed(self.edges):
            shape[edge.axis + 1 : edge.axis + 2] = [edge.lines, edge.spacing]
        by_line = [edge.axis + 1 + i for i, edge in enumerate(self.edges)]
        by_residue = [axis + 1 for axis in by_line]
        rest = [i for i in range(1, len(shape) - 2) if i not in (*by_line, *by_residue)]
        order = (0, *by_residue, *rest, *by_line, len(shape) - 2, len(shape) - 1)
        lines = xp.permute_dims(xp.reshape(lines, tuple(shape)), order)
        sizes = (shape[i] for i in rest)
        return xp.reshape(lines, (-1, *sizes, self.num_blocks, shape[-1]))

    def summed(self, halves: Array) -> Array:
        """Sums over the locations: along the diagonals of the lines of each axis, from the end.

        `halves` [offsets, B, C, B, C] are given away.
        """
        shape = halves.shape
        earlier = 1
        for edge in self.edges:
            lines = edge.lines
            later = shape[1] // (earlier * lines) * shape[2] * earlier
            by_line = (shape[0] * earlier, lines, later, lines, -1)
            halves = array_namespace(halves).reshape(halves, by_line)
            for line in range(lines - 2, -1, -1):
                here = (slice(None), line, slice(None), slice(None, -1), slice(None))
                halves = add_at(halves, here, halves[:, line + 1, :, 1:, :])
            earlier *= lines
        return array_namespace(halves).reshape(halves, shape)


@functools.lru_cache(maxsize=256)
def borders_of(grid: TapGrid) -> tuple[Border, ...]:
    """All borders of the images of a grid, edges of one axis first."""
    edges = [list(_edges(i, axis)) for i, axis in enumerate(grid.axes)]
    return tuple(
        _border(grid, chosen)
        for count in range(1, len(grid.axes) + 1)
        for axes in itertools.combinations(edges, count)
        for chosen in itertools.product(*axes)
    )


def _edges(index: int, axis: Axis) -> Iterator[Edge]:
    """The edge before the window, and that behind it, where some tap reads a position."""
    start, stop = axis.window
    nearest, farthest = min(axis.shifts), max(axis.shifts)
    differences = math.gcd(*(shift - nearest for shift in axis.shifts))
    # Positions from the innermost outwards, to the end of the image.
    for count, from_the_end in ((start + farthest, True), (axis.size - stop - nearest, False)):
        if count <= 0:
            continue
        spacing = differences or count  # where all taps read the same, each position is a case
        lines = -(-count // spacing)
        held = min(count, axis.size)
        filled_up = lines * spacing - count
        behind_the_image = count - held
        yield Edge(
            axis=index,
            start=0 if from_the_end else axis.size - held,
            stop=held if from_the_end else axis.size,
            before=filled_up if from_the_end else behind_the_image,
            after=behind_the_image if from_the_end else filled_up,
            from_the_end=from_the_end,
            lines=lines,
            spacing=spacing,
            beginnings=tuple(
                (farthest - shift if from_the_end else shift - nearest) // spacing
                for shift in axis.shifts
            ),
        )


def _border(grid: TapGrid, edges: tuple[Edge, ...]) -> Border:
    blocks = []
    for tap, block in zip(itertools.product(*map(range, grid.shape)), grid.blocks, strict=True):
        at = 0
        for edge in edges:
            line = edge.beginnings[tap[edge.axis]]
            at = -1 if at < 0 or line >= edge.lines else at * edge.lines + line
        blocks.append(at if at < 0 else at * grid.num_blocks + block)
    mine = {edge.axis for edge in edges}
    return Border(
        edges=edges,
        sign=(-1) ** len(edges),
        others=tuple(axis for i, axis in enumerate(grid.axes) if i not in mine),
        num_blocks=math.prod(edge.lines for edge in edges) * grid.num_blocks,
        blocks=tuple(blocks),
    )
