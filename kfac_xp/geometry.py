"""Where a convolution filter is applied: padding, output size, locations. Integers only."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Padding = str | Sequence[Sequence[int]]


@dataclass(frozen=True)
class ConvGeometry:
    """The geometry of a convolution over any number of spatial axes.

    Hashable, and the same for every batch: sizes of images enter through the methods.

    Parameters
    ----------
    kernel
        Filter size along each spatial axis.
    strides, dilation
        One positive int per spatial axis.
    padding
        ``"SAME"``, ``"VALID"``, or a pair ``(before, after)`` of non-negative ints per axis.
        ``"SAME"`` gives ``ceil(size / stride)`` outputs and puts the odd zero after, as
        TensorFlow does.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]

    @classmethod
    def create(
        cls,
        kernel: Sequence[int],
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        dilation: Sequence[int] | None = None,
    ) -> ConvGeometry:
        """Check and normalise the arguments.

        ``strides`` and ``dilation`` may be given for the spatial axes alone or, as TensorFlow
        writes them, for all axes: ``(1, *spatial, 1)``. None means ones.

        Raises
        ------
        ValueError
            If a length does not fit the kernel, or a value is out of range.
        """
        kernel = _positive_ints("kernel", kernel)
        if not kernel:
            raise ValueError("`kernel` must have at least one spatial axis; got an empty shape.")
        return cls(
            kernel,
            _spatial("strides", strides, len(kernel)),
            _spatial("dilation", dilation, len(kernel)),
            _normal_padding(padding, len(kernel)),
        )

    def over_uses(self) -> ConvGeometry:
        """With one more axis in front, over which the filter has one tap: uses of the layer."""
        padding = self.padding if isinstance(self.padding, str) else ((0, 0), *self.padding)
        return ConvGeometry((1, *self.kernel), (1, *self.strides), (1, *self.dilation), padding)

    @property
    def num_axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def num_taps(self) -> int:
        """Number of filter positions: ``prod(kernel)``."""
        return math.prod(self.kernel)

    @property
    def extent(self) -> tuple[int, ...]:
        """Reach of the dilated filter along each axis: ``(k - 1) * dilation + 1``."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def output_shape(self, space: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the output for images of spatial shape `space`.

        An axis on which the filter does not fit has size 0.
        """
        return _output_shape(self, tuple(space))

    def pads(self, space: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Zeros before and after each axis of images of spatial shape `space`."""
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "VALID":
            return ((0, 0),) * self.num_axes
        totals = (
            max((out - 1) * s + reach - n, 0)
            for n, out, s, reach in zip(
                space, self.output_shape(space), self.strides, self.extent, strict=True
            )
        )
        return tuple((total // 2, total - total // 2) for total in totals)

    def lines(self, space: Sequence[int], start: int, stop: int) -> tuple[int, int, ConvGeometry]:
        """The part of the images that locations ``start <= o < stop`` of the first axis read.

        As its first and past-the-last position along that axis, and the geometry by which it has
        these locations.
        """
        size = space[0]
        (before, _), *others = self.pads(space)
        first = start * self.strides[0] - before
        last = (stop - 1) * self.strides[0] + self.extent[0] - before
        inside = min(max(first, 0), size), min(max(last, 0), size)
        own = (inside[0] - first, last - inside[1])
        return *inside, replace(self, padding=(own, *others))

    def num_locations(self, space: Sequence[int]) -> int:
        """Number of positions at which the filter is applied: ``prod(output_shape(space))``."""
        return math.prod(self.output_shape(space))

    def without_padding_taps(
        self, space: Sequence[int]
    ) -> tuple[ConvGeometry, tuple[tuple[int, int], ...]]:
        """The geometry without outer taps that meet nothing but padding, and what was left out.

        At one pixel, a 3x3 filter is a 1x1 filter. Outputs are as many and read the same pixels;
        the second result are the taps left out before and after each axis. (A tap stays where a
        geometry without it would need padding below zero.)
        """
        return _without_padding_taps(self, tuple(space))


@dataclass(frozen=True)
class TransposedConvGeometry:
    """The geometry of a transposed convolution: the adjoint of a convolution.

    Pixel i of the input reaches output ``i * stride + tap * dilation - before`` through each tap of
    the kernel, so that an axis of n pixels has ``(n - 1) * stride + extent - before - after +
    output_padding`` outputs.

    Parameters
    ----------
    adjoint
        The convolution from outputs to inputs that this is the adjoint of, its padding as pairs.
    output_padding
        Outputs after the last that the filter reaches without padding, one int per spatial axis.
    """

    adjoint: ConvGeometry
    output_padding: tuple[int, ...]

    @classmethod
    def create(
        cls,
        kernel: Sequence[int],
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        dilation: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
    ) -> TransposedConvGeometry:
        """Check and normalise the arguments.

        They are those of the adjoint convolution, as for `ConvGeometry.create`: ``"VALID"`` is no
        padding, and ``"SAME"`` that which an image of ``n * stride`` pixels has there, so that
        there are ``n * stride`` outputs. `output_padding` goes with the other forms of padding; it
        is less than the stride.

        Raises
        ------
        ValueError
            If a length does not fit the kernel, or a value is out of range.
        """
        adjoint = ConvGeometry.create(kernel, strides, padding, dilation)
        axes = tuple(zip(adjoint.extent, adjoint.strides, strict=True))
        if adjoint.padding == "SAME":
            if output_padding is not None and any(output_padding):
                raise ValueError(
                    "`output_padding` must be None with padding 'SAME', which has size * stride "
                    f"outputs; got {tuple(output_padding)}. Give the padding as pairs."
                )
            totals = [max(reach - stride, 0) for reach, stride in axes]
            pairs = tuple((total // 2, total - total // 2) for total in totals)
            extra = tuple(max(stride - reach, 0) for reach, stride in axes)
            return cls(replace(adjoint, padding=pairs), extra)
        pairs = adjoint.pads((0,) * adjoint.num_axes)
        extra = (0,) * adjoint.num_axes if output_padding is None else tuple(output_padding)
        if len(extra) != adjoint.num_axes or any(
            not 0 <= given < stride for given, (_, stride) in zip(extra, axes, strict=False)
        ):
            raise ValueError(
                f"`output_padding` must be {adjoint.num_axes} ints, each at least 0 and less than "
                f"the stride of its axis, {adjoint.strides}; got {extra}."
            )
        return cls(replace(adjoint, padding=pairs), tuple(int(e) for e in extra))

    def output_shape(self, space: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the output for images of spatial shape `space`."""
        return tuple(
            max(0, (n - 1) * s + reach - sum(pads) + extra)
            for n, s, reach, pads, extra in zip(
                space,
                self.adjoint.strides,
                self.adjoint.extent,
                self.adjoint.pads(space),
                self.output_padding,
                strict=True,
            )
        )

    @property
    def spread_pads(self) -> tuple[tuple[int, int], ...]:
        """Pixels before and after each axis of the spread images; negative where some are cut off.

        See `kfac_xp.ops.spread_images`, which numbers pixels from the end.
        """
        return tuple(
            (reach - 1 - after + extra, reach - 1 - before)
            for reach, (before, after), extra in zip(
                self.adjoint.extent,
                self.adjoint.pads((0,) * len(self.output_padding)),
                self.output_padding,
                strict=True,
            )
        )

    @property
    def of_spread(self) -> ConvGeometry:
        """The convolution, of stride 1, of the spread images that this is."""
        pads = tuple((max(before, 0), max(after, 0)) for before, after in self.spread_pads)
        adjoint = self.adjoint
        return ConvGeometry(adjoint.kernel, (1,) * adjoint.num_axes, adjoint.dilation, pads)


# Asked for several times in one call of an op, which may be a small one.


@functools.lru_cache(maxsize=1024)
def _output_shape(geometry: ConvGeometry, space: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(geometry.padding, str):
        if geometry.padding == "SAME":
            return tuple(-(-n // s) for n, s in zip(space, geometry.strides, strict=True))
        pads: Sequence[tuple[int, int]] = ((0, 0),) * geometry.num_axes
    else:
        pads = geometry.padding
    return tuple(
        max(0, (n + before + after - reach) // s + 1)
        for n, (before, after), reach, s in zip(
            space, pads, geometry.extent, geometry.strides, strict=True
        )
    )


@functools.lru_cache(maxsize=1024)
def _without_padding_taps(
    geometry: ConvGeometry, space: tuple[int, ...]
) -> tuple[ConvGeometry, tuple[tuple[int, int], ...]]:
    pads, outs = geometry.pads(space), geometry.output_shape(space)
    axes = zip(space, outs, pads, geometry.kernel, geometry.strides, geometry.dilation, strict=True)
    dropped, padding = [], []
    for n, out, (before, after), k, s, d in axes:
        meets = [any(0 <= o * s + tap * d - before < n for o in range(out)) for tap in range(k)]
        low, high = 0, 0
        if any(meets):
            low = min(meets.index(True), before // d)
            high = meets[::-1].index(True)
        last = (out - 1) * s + (k - 1 - high) * d - before
        if high and last >= n - 1:
            after = last - (n - 1)
        else:
            high = 0
        dropped.append((low, high))
        padding.append((before - low * d, after))
    kernel = tuple(k - sum(ends) for k, ends in zip(geometry.kernel, dropped, strict=True))
    cropped = ConvGeometry(kernel, geometry.strides, geometry.dilation, tuple(padding))
    return cropped, tuple(dropped)


def num_conv_locations(
    input_shape: Sequence[int],
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "SAME",
    dilation: Sequence[int] | None = None,
) -> int:
    """Number of positions at which a filter is applied to one case.

    Parameters
    ----------
    input_shape
        ``(N, *space, C_in)``; the number of cases plays no role.
    filter_shape
        ``(*kernel, C_in, C_out)``.
    strides, padding, dilation
        As for `ConvGeometry.create`.

    Raises
    ------
    ValueError
        If the numbers of axes differ, or the geometry is impossible.
    """
    geometry = ConvGeometry.create(tuple(filter_shape)[:-2], strides, padding, dilation)
    if len(input_shape) != geometry.num_axes + 2:
        raise ValueError(
            f"`input_shape` must have {geometry.num_axes + 2} entries (cases, the spatial axes of "
            f"the filter, channels); got {tuple(input_shape)}."
        )
    return geometry.num_locations(tuple(input_shape)[1:-1])


def require_channels_last(data_format: str | None) -> None:
    """Refuse a `data_format` whose channels are not the last axis.

    Raises
    ------
    ValueError
        If `data_format` is neither None nor a string that ends in "C".
    """
    if data_format is not None and not str(data_format).endswith("C"):
        raise ValueError(
            "`data_format` must be None or name a format with the channels last, such as 'NHWC'; "
            f"got {data_format!r}. Move the channel axis to the end before passing arrays."
        )


def _positive_ints(name: str, values: Sequence[int]) -> tuple[int, ...]:
    ints = tuple(int(v) for v in values)
    if any(v != given or v < 1 for v, given in zip(ints, values, strict=True)):
        raise ValueError(f"`{name}` must hold positive ints; got {tuple(values)}.")
    return ints


def _spatial(name: str, values: Sequence[int] | None, num_axes: int) -> tuple[int, ...]:
    if values is None:
        return (1,) * num_axes
    ints = _positive_ints(name, values)
    if len(ints) == num_axes + 2:
        if ints[0] != 1 or ints[-1] != 1:
            raise ValueError(
                f"`{name}` over all axes must be 1 for the batch and the channels; got {ints}."
            )
        return ints[1:-1]
    if len(ints) != num_axes:
        raise ValueError(
            f"`{name}` must have {num_axes} entries (one per spatial axis of the filter) or "
            f"{num_axes + 2} (with the batch and the channels); got {ints}."
        )
    return ints


def _normal_padding(padding: Padding, num_axes: int) -> str | tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(
                "`padding` must be 'SAME', 'VALID' or a pair (before, after) per spatial axis; "
                f"got {padding!r}."
            )
        return padding.upper()
    pairs = tuple(tuple(int(p) for p in pair) for pair in padding)
    if len(pairs) != num_axes or any(len(p) != 2 or min(p) < 0 for p in pairs):
        raise ValueError(
            f"`padding` must be 'SAME', 'VALID' or {num_axes} pairs (before, after) of "
            f"non-negative ints, one per spatial axis; got {padding!r}."
        )
    return tuple((before, after) for before, after in pairs)
