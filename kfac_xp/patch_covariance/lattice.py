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
from dataclasses import dataclass

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
        The locations ``start <= o < stop`` that count.
    read
        The part of its pixels that a phase's most central tap reads from the window, or 0 if no
        tap reads one of them; the least over phases.
    """

    size: int
    shifts: tuple[int, ...]
    window: tuple[int, int]
    read: float

    @property
    def offsets(self) -> tuple[int, ...]:
        """Differences between two shifts, ascending: symmetric around 0."""
        return tuple(sorted({u - t for t in self.shifts for u in self.shifts}))


def counted_positions(axis: Axis) -> list[list[float]]:
    """1 where a tap (row) reads a position (column) from a location that counts, else 0."""
    first, last = axis.window
    return [
        [float(first + shift <= y < last + shift) for y in range(axis.size)]
        for shift in axis.shifts
    ]


@dataclass(frozen=True)
class TapGrid:
    """The taps of a filter over images [N, *sizes, blocks, C].

    Parameters
    ----------
    axes
        The images' spatial axes, each with the filter's taps along it.
    blocks
        For each tap, in row-major order, the block that it reads.
    num_blocks
        Images may have more blocks than taps read.
    """

    axes: tuple[Axis, ...]
    blocks: tuple[int, ...]
    num_blocks: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of taps along each axis."""
        return tuple(len(axis.shifts) for axis in self.axes)

    @property
    def num_taps(self) -> int:
        """Number of taps."""
        return len(self.blocks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Spatial shape of the images."""
        return tuple(axis.size for axis in self.axes)

    @property
    def has_correlations(self) -> bool:
        """True if correlations over all locations serve.

        For that two taps must read at different shifts. And of each phase all pixels must be read,
        half of them by one tap: otherwise more would be subtracted than remains, and rounding
        with it.
        """
        read = math.prod(axis.read for axis in self.axes)
        return read >= 0.5 and any(len(axis.offsets) > 1 for axis in self.axes)


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
    return Lattice(TapGrid(tuple(axes), tuple(blocks), math.prod(numbers)), tuple(phases))


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
    filled = [(first, last) for first, last, _ in spans if last > first]
    if not filled:
        return None
    low, high = min(first for first, _ in filled), max(last for _, last in filled)
    cuts = tuple(
        PhaseCut(
            first - low, start, min(size, start + stride * (last - first)), stride, high - last
        )
        if last > first
        else PhaseCut(high - low, 0, 0, 1, 0)
        for first, last, start in spans
    )
    shifts_of = {phase: [shift for shift, p in taps if p == phase] for phase in used}
    read = min(
        _part_read(range(first, last), [range(shift, out + shift) for shift in shifts_of[phase]])
        for phase, (first, last, _) in zip(used, spans, strict=True)
        if last > first
    )
    axis = Axis(high - low, tuple(shift - low for shift, _ in taps), (0, out), read)
    return axis, cuts, tuple(used.index(phase) for _, phase in taps)


def _part_read(pixels: range, reads: list[range]) -> float:
    """The largest part of the pixels that one tap reads; 0 if a pixel is read by none."""
    if set(pixels) - set().union(*reads):
        return 0.0
    counts = (min(pixels.stop, r.stop) - max(pixels.start, r.start) for r in reads)
    return max(0, *counts) / len(pixels)


def _flat_index(index: Sequence[int], shape: Sequence[int]) -> int:
    flat = 0
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


def ranges(stop: int, step: int) -> Iterator[tuple[int, int]]:
    """``(start, end)`` of the pieces of ``range(stop)``, each `step` long but the last."""
    return ((start, min(start + step, stop)) for start in range(0, stop, step))
