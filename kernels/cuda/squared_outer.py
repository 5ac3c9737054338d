"""Sums of squared outer products on CUDA devices: what the kernels compute, in the ops' shapes."""

from __future__ import annotations

import math
from typing import Any

from numba import cuda
from numpy import uint64

from kfac_xp.kernels.cuda import squared_channels, squared_tiles
from kfac_xp.kernels.cuda.launch import configured, current_stream, num_blocks, on_device
from kfac_xp.kernels.cuda.sizes import sizes_of
from kfac_xp.kernels.three_axes import ThreeAxes, three_axes

# Where the result has fewer tiles, the cases are divided into parts, so that there are about so
# many blocks. The number does not depend on the device, as the result's last bits would. The parts
# take up to so many tiles, 16 MiB, however many cases there are.
_BLOCKS = 512


def squared_outer(rows: Any, grads: Any) -> Any:
    """See ``kfac_xp.ops.squared_outer``."""
    if rows.ndim == 2:
        rows, grads = rows[:, None, :], grads[:, None, :]
    # Rows are the pixels of an image under a filter of one tap.
    num_cases, num_locations, d = rows.shape
    line, one = (1, 1, num_locations), (1, 1, 1)
    axes = ThreeAxes(line, line, one, one, one, (0, 0, 0), line)
    return _squares(rows.reshape(num_cases, *line, d), grads, axes, (d, grads.shape[-1]), 1)


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
    """See ``kfac_xp.ops.conv_squared_outer``. The registry keeps `rotations` from it."""
    num_cases, *space, channels = inputs.shape
    axes = three_axes(geometry, tuple(space))
    d, c_out = math.prod(axes.kernel) * channels // groups, outputs_grad.shape[-1]
    images = inputs.reshape(num_cases, *axes.space, channels)
    grads = outputs_grad.reshape(num_cases, math.prod(axes.out), c_out)
    out = _squares(images, grads, axes, (d + has_bias, c_out), groups)
    if patch_mask is not None:
        with inputs.device:
            # A number that multiplies a row of every case's product multiplies its squares twice.
            out[:d, :] *= patch_mask.reshape(d, 1).astype(out.dtype, copy=False) ** 2
    return out


def _squares(images: Any, grads: Any, axes: ThreeAxes, shape: tuple[int, int], groups: int) -> Any:
    """Of images [N, *space, C] and grads [N, T, C_out]: `shape` is [D / groups (+ 1), C_out]."""
    import cupy

    dtype = cupy.float64 if images.dtype == cupy.float64 else cupy.float32
    num_cases, channels = images.shape[0], images.shape[-1]
    with images.device:
        if grads.size == 0 or math.prod(shape) == 0:
            return cupy.zeros(shape, dtype=dtype)
        # With one channel per group there is no product of matrices.
        kernel = squared_channels if channels == groups else squared_tiles
        tiles = kernel.num_tiles(shape, groups, dtype)
        parts = cupy.empty((max(1, min(num_cases, _BLOCKS // tiles)), *shape), dtype=dtype)
        # Nothing is read of images without pixels, but there must be something to point to.
        flat = (images if images.size else grads).reshape(-1), grads.reshape(-1)
        sizes = sizes_of(axes, num_cases, channels, shape[1], groups)
        kernel.launch(*on_device(*flat), sizes, *on_device(parts), stream=current_stream())
        if len(parts) == 1:
            return parts[0]
        out = cupy.empty(shape, dtype=dtype)
        add_up(*on_device(parts.reshape(len(parts), -1), out.reshape(-1)), stream=current_stream())
        return out


def add_up(parts: Any, out: Any, *, threads: int = 256, stream: Any = 0) -> None:
    """Fill `out` [n] with the sum of `parts` [parts, n], in their order."""
    configured(_add_up, num_blocks(out.size, threads), threads, stream)(parts, out)


@cuda.jit
def _add_up(parts, out):
    """Write every element of `out`: thread i the elements i, i + number of threads, ..."""
    for i in range(cuda.grid(1), out.size, cuda.gridsize(1)):
        total = parts[0, uint64(i)]
        for part in range(1, parts.shape[0]):
            total += parts[uint64(part), uint64(i)]
        out[uint64(i)] = total
