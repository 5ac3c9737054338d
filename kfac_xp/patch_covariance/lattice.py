"""A convolution's taps as shifts on images where locations are consecutive: integers only.

With stride 1 a tap reads, at location o, the position o + shift. A strided convolution becomes one
of stride 1 on its phase images, every s-th pixel along each axis: tap t reads phase (t r) mod s at
shift (t r) // s, for dilation r. A padding of zeros only moves the origin.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kfac_xp.backend import array_namespace
from kfac_xp.geometry import ConvGeometry
from kfac_xp.linalg import pad_with_zeros
from kfac_xp.typing import Array


@dataclass(frozen=True)
class Axis:
    """One spatial axis of the images.

    Parameters
    ----------
    size
        Number of positions; beyond them the images are zero.
    shifts
        For each tap along the filter's axis: location o reads position ``o + shift``. Ascending.
    window
        The locations ``start <= o < stop`` that count, or None for all, those included where the
        filter hangs over the border.
    """

    size: int
    shifts: tuple[int, ...]
    window: tuple[int, int] | None

    @property
    def reaching(self) -> tuple[int, int]:
        """First and past-the-last location from which some tap reads a position."""
        return -max(self.shifts), self.size - min(self.shifts)

    @property
    def locations(self) -> tuple[int, int]:
        """First and past-the-last location that counts and can be other than zero."""
        first, last = self.reaching
        if self.window is not None:
            first, last = max(first, self.window[0]), min(last, self.window[1])
        return first, max(first, last)

    @property
    def outside(self) -> Iterator[int]:
        """The locations that do not count, and from which some tap reads a position."""
        if self.window is None:
            return iter(())
        first, last = self.reaching
        start, stop = self.window
        return itertools.chain(range(first, min(start, last)), range(max(stop, first), last))

    @property
    def most_read(self) -> float:
        """The largest part of the positions that one tap reads from the locations that count."""
        first, last = self.locations
        counts = (min(last + s, self.size) - max(first + s, 0) for s in self.shifts)
        return max(0, *counts) / self.size

    @property
    def offsets(self) -> tuple[int, ...]:
        """Differences between two shifts, ascending: symmetric around 0."""
        return tuple(sorted({u - t for t in self.shifts for u in self.shifts}))

    def taps_at(self, location: int) -> range:
        """The taps that read a position from this location."""
        inside = [i for i, s in enumerate(self.shifts) if 0 <= location + s < self.size]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


def counted_positions(axis: Axis) -> list[list[float]]:
    """1 where a tap (row) reads a position (column) from a location that counts, else 0."""
    first, last = axis.locations
    return [
        [float(first + shift <= y < last + shift) for y in range(axis.size)]
        for shift in axis.shifts
    ]


@dataclass(frozen=True)
class TapGrid:
    """The taps of a filter over images [N, *sizes, blocks, C].

    Parameters
    ----------
    grid
        Number of taps along each axis of the filter.
    axes
        The images' spatial axes.
    filter_axis
        For each of `axes`, which axis of `grid` it belongs to. An axis of the grid that has none
        has become blocks.
    blocks
        For each tap, in row-major order, the block that it reads.
    num_blocks
        Images may have more blocks than taps read.
    """

    grid: tuple[int, ...]
    axes: tuple[Axis, ...]
    filter_axis: tuple[int, ...]
    blocks: tuple[int, ...]
    num_blocks: int

    @property
    def num_taps(self) -> int:
        """Number of taps."""
        return math.prod(self.grid)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Spatial shape of the images."""
        return tuple(axis.size for axis in self.axes)

    @property
    def num_rows(self) -> int:
        """Number of locations of one case that count and can be other than zero."""
        return math.prod(last - first for first, last in (axis.locations for axis in self.axes))

    @property
    def has_correlations(self) -> bool:
        """True if correlations over all locations serve.

        For that two taps must read at different shifts; and one tap must read half of all
        positions: otherwise more would be subtracted than remains, and rounding with it.
        """
        most_read = math.prod(axis.most_read for axis in self.axes)
        return most_read >= 0.5 and any(len(axis.offsets) > 1 for axis in self.axes)

    @functools.cached_property
    def shifts(self) -> list[tuple[int, ...]]:
        """Shift along each of `axes`, for each tap in row-major order."""
        return [
            tuple(axis.shifts[tap[i]] for axis, i in zip(self.axes, self.filter_axis, strict=True))
            for tap in itertools.product(*map(range, self.grid))
        ]

    def everywhere(self) -> TapGrid:
        """The same with all locations counted."""
        return replace(self, axes=tuple(replace(axis, window=None) for axis in self.axes))

    def slabs(self) -> Iterator[Slab]:
        """What `everywhere` counts and this grid does not, in pieces without overlap.

        A piece is one location along one axis; along the axes before it only those in the window
        are taken, along the axes after it all.
        """
        for i, axis in enumerate(self.axes):
            for location in axis.outside:
                taps = axis.taps_at(location)
                if taps:
                    yield self._slab(i, location, taps)

    def _slab(self, i: int, location: int, taps: range) -> Slab:
        axis, filter_axis = self.axes[i], self.filter_axis[i]
        positions = tuple(sorted({location + axis.shifts[tap] for tap in taps}))
        blocks = []
        for tap, block in zip(itertools.product(*map(range, self.grid)), self.blocks, strict=True):
            if tap[filter_axis] in taps:
                row = positions.index(location + axis.shifts[tap[filter_axis]])
                blocks.append(row * self.num_blocks + block)
        grid = list(self.grid)
        grid[filter_axis] = len(taps)
        later = (replace(a, window=None) for a in self.axes[i + 1 :])
        remaining = TapGrid(
            grid=tuple(grid),
            axes=(*self.axes[:i], *later),
            filter_axis=self.filter_axis[:i] + self.filter_axis[i + 1 :],
            blocks=tuple(blocks),
            num_blocks=len(positions) * self.num_blocks,
        )
        return Slab(i, positions, filter_axis, taps, remaining)


@dataclass(frozen=True)
class Slab:
    """The taps that read something from one location along one axis.

    Parameters
    ----------
    axis
        Index of the axis among the images'.
    positions
        Positions along it that are read.
    filter_axis, taps
        The filter's axis, and the taps along it that remain.
    grid
        Those taps, on images without the axis: its positions have become blocks.
    """

    axis: int
    positions: tuple[int, ...]
    filter_axis: int
    taps: range
    grid: TapGrid

    def images(self, images: Array) -> Array:
        """The slab's images [N, *sizes without the axis, blocks, C]."""
        xp = array_namespace(images)
        axis = self.axis + 1
        cuts = [images[(slice(None),) * axis + (position, ...)] for position in self.positions]
        return cuts[0] if len(cuts) == 1 else xp.concat(cuts, axis=-2)


@dataclass(frozen=True)
class PhaseCut:
    """How one phase is cut out of an axis: `before` zeros, ``[start:stop:step]``, `after` zeros."""

    before: int
    start: int
    stop: int
    step: int
    after: int


@dataclass(frozen=True)
class Lattice:
    """A convolution of images of one size as a `TapGrid`, and how its images are made.

    Parameters
    ----------
    grid
        The taps.
    phases
        For each axis, the phases that some tap reads.
    """

    grid: TapGrid
    phases: tuple[tuple[PhaseCut, ...], ...]

    def images(self, inputs: Array) -> Array:
        """[N, *sizes, blocks, C] from inputs [N, *space, C]; a view where there is one phase."""
        xp = array_namespace(inputs)
        blocks = []
        for cuts in itertools.product(*self.phases):
            index = tuple(slice(cut.start, cut.stop, cut.step) for cut in cuts)
            block = inputs[(slice(None), *index, slice(None))]
            blocks.append(pad_with_zeros(block, [(cut.before, cut.after) for cut in cuts]))
        if len(blocks) == 1:
            return xp.expand_dims(blocks[0], axis=-2)
        return xp.stack(blocks, axis=-2)


@functools.lru_cache(maxsize=1024)
def lattice_of(geometry: ConvGeometry, space: tuple[int, ...]) -> Lattice | None:
    """The lattice of a convolution of images of spatial shape `space`; None if no pixel is read."""
    parts = [
        _axis_of(*numbers)
        for numbers in zip(
            space,
            geometry.output_shape(space),
            geometry.kernel,
            geometry.strides,
            geometry.dilation,
            [before for before, _ in geometry.pads(space)],
            strict=True,
        )
    ]
    if any(part is None for part in parts):
        return None
    axes, phases, phase_of_tap = zip(*(part for part in parts if part is not None), strict=True)
    numbers = [len(cuts) for cuts in phases]
    blocks = [_flat_index(tap_phases, numbers) for tap_phases in itertools.product(*phase_of_tap)]
    num_axes = len(axes)
    grid = TapGrid(
        grid=geometry.kernel,
        axes=tuple(axes),
        filter_axis=tuple(range(num_axes)),
        blocks=tuple(blocks),
        num_blocks=math.prod(numbers),
    )
    return Lattice(grid, tuple(phases))


def _axis_of(
    size: int, out: int, kernel: int, stride: int, dilation: int, before: int
) -> tuple[Axis, tuple[PhaseCut, ...], tuple[int, ...]] | None:
    """The axis, the cuts of its phases, and the number of each tap's phase."""
    if out == 0:
        return None
    taps = [divmod(tap * dilation, stride) for tap in range(kernel)]
    used = sorted({phase for _, phase in taps})
    spans = []
    for phase in used:
        # Padded position stride * j + phase holds pixel stride * j + phase - before.
        first = max(0, -((phase - before) // stride))
        start = stride * first + phase - before
        reach = out + max(shift for shift, tap_phase in taps if tap_phase == phase)
        last = min(first - (start - size) // stride, reach)
        spans.append((first, max(first, last), start))
    read = [(first, last) for first, last, _ in spans if last > first]
    if not read:
        return None
    low, high = min(first for first, _ in read), max(last for _, last in read)
    cuts = tuple(
        PhaseCut(
            first - low, start, min(size, start + stride * (last - first)), stride, high - last
        )
        if last > first
        else PhaseCut(high - low, 0, 0, 1, 0)
        for first, last, start in spans
    )
    axis = Axis(high - low, tuple(shift - low for shift, _ in taps), (0, out))
    return axis, cuts, tuple(used.index(phase) for _, phase in taps)


def _flat_index(index: Sequence[int], shape: Sequence[int]) -> int:
    flat = 0
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


def ranges(stop: int, step: int) -> Iterator[tuple[int, int]]:
    """``(start, end)`` of the pieces of ``range(stop)``, each `step` long but the last."""
    return ((start, min(start + step, stop)) for start in range(0, stop, step))
