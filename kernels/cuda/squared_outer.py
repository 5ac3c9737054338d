"""Sums of squared outer products on CUDA devices: what the kernels compute, in the ops' shapes."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda
from numpy import uint32, uint64

from kfac_xp.kernels.cuda import squared_channels, squared_tiles, tiles
from kfac_xp.kernels.cuda.launch import configured, current_stream, num_blocks, on_device
from kfac_xp.kernels.cuda.sizes import sizes_of
from kfac_xp.kernels.three_axes import ThreeAxes, three_axes

THREADS = (32, 8)
"""Threads that add up parts: of neighbouring elements, and of each."""


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
        # Nothing is read of images without pixels, but there must be something to point to.
        flat = (images if images.size else grads).reshape(-1), grads.reshape(-1)
        sizes = sizes_of(axes, num_cases, channels, shape[1], groups)
        # With one channel per group there is no product of matrices.
        locations = int(sizes.locations)
        if channels == groups:
            parts, splits = squared_channels.division(shape[1], num_cases, locations)
            launch = functools.partial(squared_channels.launch, splits=splits)
        else:
            name = np.dtype(dtype).name
            plan = tiles.plan(*shape, groups, num_cases, locations, name)
            (_, parts, splits), launch = plan, functools.partial(squared_tiles.launch, plan=plan)
        sums = cupy.empty((parts * splits, *shape), dtype=dtype)
        pixels, columns, added = on_device(*flat, sums)
        launch(pixels, columns, sizes, added, stream=current_stream())
        if len(sums) == 1:
            return sums[0]
        out = cupy.empty(shape, dtype=dtype)
        added, total = on_device(sums.reshape(len(sums), -1), out.reshape(-1))
        add_up(added, total, splits, stream=current_stream())
        return out


def add_up(parts: Any, out: Any, splits: int, *, stream: Any = 0) -> None:
    """Fill `out` [n] with the sum of `parts` [parts, n], always in the same order.

    Of several splits, which are neighbours, the sum is squared first.
    """
    add = configured(adder(*THREADS), num_blocks(out.size, THREADS[0]), THREADS, stream)
    add(parts, np.uint32(splits), out)


@functools.cache
def adder(width: int, height: int) -> Any:
    """The kernel for so many threads, ``add(parts, splits, out)``.

    It writes every element of `out`: a column of threads one element, of which each thread adds up
    every so many parts.
    """

    # Casts: see `squared_tiles`.
    @cuda.jit
    def add(parts, splits, out):
        sums = cuda.shared.array((height, width), out.dtype)
        x, y = uint64(cuda.threadIdx.x), uint64(cuda.threadIdx.y)
        count, size = uint32(uint32(parts.shape[0]) // splits), uint64(out.size)
        first = uint64(cuda.blockIdx.x) * uint64(width)
        # A block steps as a whole: all its threads meet at the barriers.
        while first < size:
            i = first + x
            total = out.dtype.type(0)
            part = uint32(y)
            while i < size and part < count:
                row = uint64(part) * uint64(splits)
                value = parts[row, i]
                split = uint32(1)
                while split < splits:
                    value += parts[row + uint64(split), i]
                    split = uint32(split + uint32(1))
                total += value if splits == uint32(1) else value * value
                part = uint32(part + uint32(height))
            sums[y, x] = total
            cuda.syncthreads()
            if y == uint64(0) and i < size:
                for other in range(1, height):
                    total += sums[uint64(other), x]
                out[i] = total
            cuda.syncthreads()
            first += uint64(cuda.gridDim.x) * uint64(width)

    return add
