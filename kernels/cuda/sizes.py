"""The numbers of a convolution as kernels read them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from kfac_xp.kernels.three_axes import ThreeAxes


class Sizes(NamedTuple):
    """Of 32 bits: unsigned above the line, to divide by; signed below it. Digits are spatial axes.

    Parameters
    ----------
    cases, locations, groups
        How many there are.
    entries
        Of a patch of one group.
    group_in, group_out
        Channels of a group.
    out, taps, size, stride, dilation, before
        As in `ThreeAxes`; `size` is `space`.
    step, step_case
        Elements from one pixel to the next along an axis, and from one image to the next.
    """

    cases: Any
    locations: Any
    groups: Any
    entries: Any
    group_in: Any
    group_out: Any
    out_0: Any
    out_1: Any
    out_2: Any
    taps_0: Any
    taps_1: Any
    taps_2: Any
    size_0: Any
    size_1: Any
    size_2: Any
    # ------------
    stride_0: Any
    stride_1: Any
    stride_2: Any
    dilation_0: Any
    dilation_1: Any
    dilation_2: Any
    before_0: Any
    before_1: Any
    before_2: Any
    step_0: Any
    step_1: Any
    step_2: Any
    step_case: Any


@functools.lru_cache(maxsize=256)
def sizes_of(
    axes: ThreeAxes, num_cases: int, channels: int, c_out: int = 1, groups: int = 1
) -> Sizes:
    """Of images [N, *space, C] and, if there are any, gradients with `c_out` channels.

    What divides in a kernel is at least 1, also where there is nothing.
    """
    entries = math.prod(axes.kernel) * channels // groups
    counts = num_cases, math.prod(axes.out), groups, entries, max(1, channels // groups)
    steps = [math.prod((*axes.space[axis:], channels)) for axis in (1, 2, 3, 0)]
    unsigned = (*counts, c_out // groups, *axes.out, *axes.kernel, *axes.space)
    signed = (*axes.strides, *axes.dilation, *axes.before, *steps)
    return Sizes(*map(np.uint32, unsigned), *map(np.int32, signed))
