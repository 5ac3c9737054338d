"""Patch extraction on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.three_axes import three_axes

# Runs shorter than this are copied entry by entry: a vector loop's preamble costs more.
_SHORT_RUN = 8


def extract_patches(inputs: Any, geometry: Any) -> Any:
    """See ``kfac_xp.ops.extract_patches``."""
    num_cases, *space, channels = inputs.shape
    d = math.prod(geometry.kernel) * channels
    out = np.empty((num_cases, *geometry.output_shape(space), d), dtype=inputs.dtype)
    fill_patches(np.ascontiguousarray(inputs), geometry, out)
    return out


def fill_patches(inputs: Any, geometry: Any, out: Any) -> None:
    """Write the patches of contiguous `inputs` to contiguous `out`, of the op's result shape."""
    num_cases, *space, channels = inputs.shape
    axes = three_axes(geometry, tuple(space))
    taps_0, taps_1, taps_2 = axes.kernel
    # Neighbouring taps along the last axis read neighbouring memory, unless they are dilated.
    runs = (1, taps_2 * channels) if axes.dilation[2] == 1 else (taps_2, channels)
    _fill(
        inputs.reshape(num_cases, axes.space[0], axes.space[1], axes.space[2] * channels),
        channels,
        axes.strides,
        axes.dilation,
        axes.before,
        axes.padded,
        out.reshape(num_cases, *axes.out, taps_0, taps_1, *runs),
    )


@compiled
def _fill(inputs, channels, strides, dilation, before, padded, out):
    """Write every element of `out` [N, *out, taps_0, taps_1, runs, run], case by case.

    `inputs` is [N, space_0, space_1, space_2 * C]: channels and last axis are one.

    Each case is first copied into a border of zeros, so that the loops that write patches have no
    bounds to look at.
    """
    num_cases, out_0, out_1, out_2, taps_0, taps_1, runs, run = out.shape
    _, size_0, size_1, width = inputs.shape
    image = np.zeros((padded[0], padded[1], padded[2] * channels), inputs.dtype)
    line = image.shape[2]
    flat_image = image.reshape(-1)
    flat_out = out.reshape((num_cases, out_0, out_1, out_2, taps_0 * taps_1 * runs * run))
    # Position in `image` of each entry of a patch, relative to the first. Unsigned, here and
    # below: Numba lets a signed index count from the end, and no vector loop survives the test.
    offsets = np.empty(flat_out.shape[4], np.uintp)
    entry = 0
    for tap_0 in range(taps_0):
        for tap_1 in range(taps_1):
            for r in range(runs):
                start = (tap_0 * dilation[0] * image.shape[1] + tap_1 * dilation[1]) * line
                for j in range(run):
                    offsets[entry] = start + r * dilation[2] * channels + j
                    entry += 1
    for n in range(num_cases):
        for i_0 in range(size_0):
            for i_1 in range(size_1):
                first = np.uintp(before[2] * channels)
                for j in range(np.uintp(width)):
                    image[before[0] + i_0, before[1] + i_1, first + j] = inputs[n, i_0, i_1, j]
        for o_0 in range(out_0):
            for o_1 in range(out_1):
                if run < _SHORT_RUN:
                    corner = (o_0 * strides[0] * image.shape[1] + o_1 * strides[1]) * line
                    for o_2 in range(out_2):
                        first = np.uintp(corner + o_2 * strides[2] * channels)
                        for j in range(offsets.shape[0]):
                            flat_out[n, o_0, o_1, o_2, j] = flat_image[first + offsets[j]]
                    continue
                for tap_0 in range(taps_0):
                    i_0 = np.uintp(o_0 * strides[0] + tap_0 * dilation[0])
                    for tap_1 in range(taps_1):
                        i_1 = np.uintp(o_1 * strides[1] + tap_1 * dilation[1])
                        for r in range(runs):
                            for o_2 in range(out_2):
                                first = np.uintp((o_2 * strides[2] + r * dilation[2]) * channels)
                                for j in range(np.uintp(run)):
                                    out[n, o_0, o_1, o_2, tap_0, tap_1, r, j] = image[
                                        i_0, i_1, first + j
                                    ]
