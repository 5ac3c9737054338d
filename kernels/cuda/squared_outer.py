"""Sums of squared outer products on CUDA devices."""

from __future__ import annotations

import math
from typing import Any

from numba import cuda

from kfac_xp.kernels.cuda.launch import configured, current_stream, num_blocks, on_device
from kfac_xp.kernels.three_axes import ThreeAxes, three_axes

# Length of the shared array below: the most threads that a block may have on any device.
_MAX_THREADS = 1024
_THREADS = (32, 8)


def squared_outer(rows: Any, grads: Any) -> Any:
    """See ``kfac_xp.ops.squared_outer``."""
    import cupy

    if rows.ndim == 2:
        rows, grads = rows[:, None, :], grads[:, None, :]
    with rows.device:
        shape = (rows.shape[-1], grads.shape[-1])
        if rows.size == 0 or grads.size == 0:
            return cupy.zeros(shape, dtype=rows.dtype)
        out = cupy.empty(shape, dtype=rows.dtype)
        launch(*on_device(rows, grads, out), stream=current_stream())
    return out


def conv_squared_outer(
    inputs: Any,
    outputs_grad: Any,
    geometry: Any,
    *,
    has_bias: bool = False,
    patch_mask: Any | None = None,
    groups: int = 1,
    rotations: Any | None = None,
) -> Any:
    """See ``kfac_xp.ops.conv_squared_outer``. The registry keeps groups and rotations from it."""
    import cupy

    num_cases, *space, channels = inputs.shape
    axes = three_axes(geometry, tuple(space))
    with inputs.device:
        d = math.prod(axes.kernel) * channels
        shape = (d + has_bias, outputs_grad.shape[-1])
        if outputs_grad.size == 0 or shape[0] == 0:
            return cupy.zeros(shape, dtype=inputs.dtype)
        out = cupy.empty(shape, dtype=inputs.dtype)
        mask = cupy.ones(d, dtype=inputs.dtype) if patch_mask is None else patch_mask
        images, grads, mask, diagonal = on_device(
            inputs.reshape(num_cases, *axes.space, channels),
            outputs_grad.reshape(num_cases, *axes.out, shape[1]),
            mask.reshape(d),
            out,
        )
        launch_conv(images, grads, mask, axes, diagonal, stream=current_stream())
    return out


def launch(
    rows: Any, grads: Any, out: Any, *, threads: tuple[int, int] = _THREADS, stream: Any = 0
) -> None:
    """Fill `out` [D, C] from `rows` [N, T, D] and `grads` [N, T, C]."""
    if math.prod(out.shape) > 0:
        configured(_fill, _grid(out, threads), threads, stream)(rows, grads, out)


def launch_conv(
    inputs: Any,
    grads: Any,
    mask: Any,
    axes: ThreeAxes,
    out: Any,
    *,
    threads: tuple[int, int] = _THREADS,
    stream: Any = 0,
) -> None:
    """Fill `out` [D (+ 1), C_out] from `inputs` [N, *space, C] and `grads` [N, *out, C_out].

    `mask` [D] multiplies the patches; a row of `out` beyond it is that of the bias.
    """
    if math.prod(out.shape) > 0:
        fill = configured(_fill_conv, _grid(out, threads), threads, stream)
        fill(inputs, grads, mask, axes.kernel, axes.strides, axes.dilation, axes.before, out)


def _grid(out: Any, threads: tuple[int, int]) -> tuple[int, int]:
    """Blocks along the columns of `out`, and one per row: the threads' second axis is cases."""
    return num_blocks(out.shape[1], threads[0]), num_blocks(out.shape[0], 1)


@cuda.jit
def _fill(rows, grads, out):
    """Write every element of `out`: block (x, y) the columns of tile x in row y.

    Thread (i, j) of a block adds up the cases j, j + blockDim.y, ... of column i; then the threads
    with j = 0 add up the others' sums, in their order, and write.
    """
    sums = cuda.shared.array(_MAX_THREADS, out.dtype)
    i, j = cuda.threadIdx.x, cuda.threadIdx.y
    width, height = cuda.blockDim.x, cuda.blockDim.y
    zero = out.dtype.type(0)
    # A block steps as a whole, past the edge of `out` too: all its threads meet at the barriers.
    for d in range(cuda.blockIdx.y, out.shape[0], cuda.gridDim.y):
        for first in range(cuda.blockIdx.x * width, out.shape[1], cuda.gridDim.x * width):
            c = first + i
            total = zero
            if c < out.shape[1]:
                for n in range(j, rows.shape[0], height):
                    case_grad = zero
                    for t in range(rows.shape[1]):
                        case_grad += rows[n, t, d] * grads[n, t, c]
                    total += case_grad * case_grad
            sums[j * width + i] = total
            cuda.syncthreads()
            if j == 0 and c < out.shape[1]:
                for other in range(1, height):
                    total += sums[other * width + i]
                out[d, c] = total
            cuda.syncthreads()


@cuda.jit
def _fill_conv(inputs, grads, mask, kernel, strides, dilation, before, out):
    """Write every element of `out`, owned and added up as in `_fill`; patches are never stored."""
    sums = cuda.shared.array(_MAX_THREADS, out.dtype)
    i, j = cuda.threadIdx.x, cuda.threadIdx.y
    width, height = cuda.blockDim.x, cuda.blockDim.y
    num_cases, size_0, size_1, size_2, channels = inputs.shape
    _, out_0, out_1, out_2, c_out = grads.shape
    zero = out.dtype.type(0)
    for d in range(cuda.blockIdx.y, out.shape[0], cuda.gridDim.y):
        is_bias = d >= mask.shape[0]
        tap, channel = 0, 0
        if not is_bias:
            tap, channel = d // channels, d % channels
        # Where the patch entry lies for output 0; in the border, this is negative.
        first_0 = tap // (kernel[1] * kernel[2]) * dilation[0] - before[0]
        first_1 = tap // kernel[2] % kernel[1] * dilation[1] - before[1]
        first_2 = tap % kernel[2] * dilation[2] - before[2]
        for first in range(cuda.blockIdx.x * width, c_out, cuda.gridDim.x * width):
            c = first + i
            total = zero
            if c < c_out:
                for n in range(j, num_cases, height):
                    case_grad = zero
                    for o_0 in range(out_0):
                        i_0 = first_0 + o_0 * strides[0]
                        for o_1 in range(out_1):
                            i_1 = first_1 + o_1 * strides[1]
                            inside = 0 <= i_0 < size_0 and 0 <= i_1 < size_1
                            for o_2 in range(out_2):
                                i_2 = first_2 + o_2 * strides[2]
                                if is_bias:
                                    case_grad += grads[n, o_0, o_1, o_2, c]
                                elif inside and 0 <= i_2 < size_2:
                                    patch = inputs[n, i_0, i_1, i_2, channel] * mask[d]
                                    case_grad += patch * grads[n, o_0, o_1, o_2, c]
                    total += case_grad * case_grad
            sums[j * width + i] = total
            cuda.syncthreads()
            if j == 0 and c < c_out:
                for other in range(1, height):
                    total += sums[other * width + i]
                out[d, c] = total
            cuda.syncthreads()
