"""Patch extraction on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.three_axes import three_axes

# Runs shorter than this are copied entry by entry: a vector loop's preamble costs more.
_SHORT_RUN = 8


def extract_patches(inputs: Any, geometry: Any) -> Any:
    """See ``kfac_xp.ops.extract_patches``."""
    num_cases, *space, channels = inputs.shape
    axes = three_axes(geometry, tuple(space))
    taps = axes.kernel
    out = np.empty(
        (num_cases, *geometry.output_shape(space), taps[0] * taps[1] * taps[2] * channels),
        dtype=inputs.dtype,
    )
    # Neighbouring taps along the last axis read neighbouring memory, unless they are dilated.
    runs = (1, taps[2] * channels) if axes.dilation[2] == 1 else (taps[2], channels)
    _fill(
        np.ascontiguousarray(inputs).reshape(num_cases, *axes.space, channels),
        axes.strides,
        axes.dilation,
        axes.before,
        axes.padded,
        out.reshape(num_cases, *axes.out, *taps[:2], *runs),
    )
    return out


@compiled
def _fill(inputs, strides, dilation, before, padded, out):
    """Write every element of `out` [N, *out, taps_0, taps_1, runs, run].

    One case at a time is copied into a zero border, so that the loops that write patches have no
    bounds to look at.
    """
    num_cases, out_0, out_1, out_2, taps_0, taps_1, runs, run = out.shape
    _, size_0, size_1, size_2, channels = inputs.shape
    stride_0, stride_1, stride_2 = strides
    image = np.zeros((padded[0], padded[1], padded[2] * channels), inputs.dtype)
    line = image.shape[2]
    flat_image = image.reshape(-1)
    flat_out = out.reshape((num_cases, out_0, out_1, out_2, taps_0 * taps_1 * runs * run))
    # Position in `image` of each entry of a patch, relative to the first. Unsigned, here and
    # below: Numba makes every signed index wrap around, which no vector loop survives.
    offsets = np.empty(taps_0 * taps_1 * runs * run, np.uintp)
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
                for i_2 in range(size_2):
                    first = np.uintp((before[2] + i_2) * channels)
                    for c in range(np.uintp(channels)):
                        image[before[0] + i_0, before[1] + i_1, first + c] = inputs[
                            n, i_0, i_1, i_2, c
                        ]
        for o_0 in range(out_0):
            for o_1 in range(out_1):
                if run < _SHORT_RUN:
                    corner = (o_0 * stride_0 * image.shape[1] + o_1 * stride_1) * line
                    for o_2 in range(out_2):
                        first = np.uintp(corner + o_2 * stride_2 * channels)
                        for j in range(offsets.shape[0]):
                            flat_out[n, o_0, o_1, o_2, j] = flat_image[first + offsets[j]]
                    continue
                for tap_0 in range(taps_0):
                    i_0 = np.uintp(o_0 * stride_0 + tap_0 * dilation[0])
                    for tap_1 in range(taps_1):
                        i_1 = np.uintp(o_1 * stride_1 + tap_1 * dilation[1])
                        for r in range(runs):
                            for o_2 in range(out_2):
                                first = np.uintp((o_2 * stride_2 + r * dilation[2]) * channels)
                                for j in range(np.uintp(run)):
                                    out[n, o_0, o_1, o_2, tap_0, tap_1, r, j] = image[
                                        i_0, i_1, first + j
                                    ]
