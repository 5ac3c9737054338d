"""A convolution over one to three spatial axes, written as one over three."""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_AXES = 3


class ThreeAxes(NamedTuple):
    """Sizes of one convolution along three spatial axes; the missing ones lead and are trivial."""

    space: tuple[int, int, int]
    out: tuple[int, int, int]
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]
    dilation: tuple[int, int, int]
    before: tuple[int, int, int]
    padded: tuple[int, int, int]


def three_axes(geometry: Any, space: tuple[int, ...]) -> ThreeAxes:
    """The geometry applied to images of spatial shape `space`.

    A leading axis of size 1 under a filter of size 1 changes neither the order of the patches nor
    that of their entries, and lets one kernel serve every rank.
    """
    pads = geometry.pads(space)
    return ThreeAxes(
        space=_lead(space, 1),
        out=_lead(geometry.output_shape(space), 1),
        kernel=_lead(geometry.kernel, 1),
        strides=_lead(geometry.strides, 1),
        dilation=_lead(geometry.dilation, 1),
        before=_lead([before for before, _ in pads], 0),
        padded=_lead([n + sum(pair) for n, pair in zip(space, pads, strict=True)], 1),
    )


def _lead(values: Any, neutral: int) -> Any:
    ints = tuple(int(v) for v in values)
    return (neutral,) * (MAX_AXES - len(ints)) + ints
