"""Patch extraction on CUDA devices."""

from __future__ import annotations

import math
from typing import Any

from numba import cuda

from kfac_xp.kernels.cuda.launch import configured, current_stream, num_blocks, on_device
from kfac_xp.kernels.three_axes import ThreeAxes, three_axes


def extract_patches(inputs: Any, geometry: Any) -> Any:
    """See ``kfac_xp.ops.extract_patches``."""
    import cupy

    num_cases, *space, channels = inputs.shape
    axes = three_axes(geometry, tuple(space))
    with inputs.device:
        d = math.prod(axes.kernel) * channels
        out = cupy.empty((num_cases, *geometry.output_shape(space), d), dtype=inputs.dtype)
        if out.size > 0:
            images, patches = on_device(
                inputs.reshape(num_cases, *axes.space, channels),
                out.reshape(num_cases, *axes.out, *axes.kernel, channels),
            )
            launch(images, axes, patches, stream=current_stream())
    return out


def launch(inputs: Any, axes: ThreeAxes, out: Any, *, threads: int = 256, stream: Any = 0) -> None:
    """Fill `out` [N, *out, *kernel, C] from `inputs` [N, *space, C]."""
    fill = configured(_fill, num_blocks(math.prod(out.shape), threads), threads, stream)
    fill(inputs, axes.strides, axes.dilation, axes.before, out)


@cuda.jit
def _fill(inputs, strides, dilation, before, out):
    """Write every element of `out`: thread i the elements i, i + number of threads, ...

    Neighbouring threads write neighbouring elements.
    """
    _, size_0, size_1, size_2, channels = inputs.shape
    _, out_0, out_1, out_2, taps_0, taps_1, taps_2, _ = out.shape
    size = out.shape[0] * out_0 * out_1 * out_2 * taps_0 * taps_1 * taps_2 * channels
    zero = out.dtype.type(0)
    for element in range(cuda.grid(1), size, cuda.gridsize(1)):
        rest, c = element // channels, element % channels
        rest, tap_2 = rest // taps_2, rest % taps_2
        rest, tap_1 = rest // taps_1, rest % taps_1
        rest, tap_0 = rest // taps_0, rest % taps_0
        rest, o_2 = rest // out_2, rest % out_2
        rest, o_1 = rest // out_1, rest % out_1
        n, o_0 = rest // out_0, rest % out_0
        i_0 = o_0 * strides[0] + tap_0 * dilation[0] - before[0]
        i_1 = o_1 * strides[1] + tap_1 * dilation[1] - before[1]
        i_2 = o_2 * strides[2] + tap_2 * dilation[2] - before[2]
        value = zero
        if 0 <= i_0 < size_0 and 0 <= i_1 < size_1 and 0 <= i_2 < size_2:
            value = inputs[n, i_0, i_1, i_2, c]
        out[n, o_0, o_1, o_2, tap_0, tap_1, tap_2, c] = value
