"""Patch extraction on CUDA devices."""

from __future__ import annotations

import math
from typing import Any

from numba import cuda
from numpy import int32, int64, uint32, uint64

from kfac_xp.kernels.cuda.launch import bits_on_device, configured, current_stream, num_blocks
from kfac_xp.kernels.cuda.sizes import sizes_of
from kfac_xp.kernels.three_axes import three_axes

# Locations whose corners a block computes at a time, and loads that a thread issues before it
# stores anything.
LOCATIONS = 64
_EACH = 4
# More blocks would compute more often which entry of a patch is whose.
_MAX_BLOCKS = 4096


def extract_patches(inputs: Any, geometry: Any) -> Any:
    """See ``kfac_xp.ops.extract_patches``."""
    import cupy

    num_cases, *space, channels = inputs.shape
    axes = three_axes(geometry, tuple(space))
    d = math.prod(axes.kernel) * channels
    with inputs.device:
        out = cupy.empty((num_cases, *geometry.output_shape(space), d), dtype=inputs.dtype)
        if out.size > 0:
            # Nothing is read of images without pixels, but there must be something to point to.
            flat = (inputs if inputs.size else out).reshape(-1), out.reshape(-1)
            images, patches = bits_on_device(*flat)
            launch(images, sizes_of(axes, num_cases, channels), patches, stream=current_stream())
    return out


def launch(images: Any, sizes: Any, out: Any, *, threads: int = 256, stream: Any = 0) -> None:
    """Fill flat `out` [N * T * D] from flat `images` [N * space * C]."""
    d = int(sizes.entries)
    # Threads along the entries of a patch, in blocks of about the same width; then locations.
    across = num_blocks(d, threads)
    width = -(-d // across)
    if across > 1:
        width = min(threads, -(-width // 32) * 32)
    chunks = num_blocks(out.size // d, LOCATIONS)
    grid = across, min(chunks, max(1, _MAX_BLOCKS // across))
    configured(_fill, grid, (width, max(1, threads // width)), stream)(images, sizes, out)


# Casts to 32 bits and of indices: see `squared_tiles`.
@cuda.jit
def _fill(images, sizes, out):
    """Write every element of `out`: a thread one entry of the patches at some of the locations.

    Neighbouring threads write neighbouring elements, and read them as far as a row of pixels goes.
    """
    corner_0 = cuda.shared.array(LOCATIONS, int32)
    corner_1 = cuda.shared.array(LOCATIONS, int32)
    corner_2 = cuda.shared.array(LOCATIONS, int32)
    corner = cuda.shared.array(LOCATIONS, int64)
    loaded = cuda.local.array(_EACH, out.dtype)
    zero = out.dtype.type(0)
    width, height = uint32(cuda.blockDim.x), uint32(cuda.blockDim.y)
    y = uint32(cuda.threadIdx.y)
    thread = uint32(y * width + cuda.threadIdx.x)
    num_rows = int64(sizes.cases) * int64(sizes.locations)
    num_entries = uint32(sizes.entries)
    first_d = uint32(cuda.blockIdx.x * width)
    # A block steps as a whole: all its threads meet at the barriers.
    while first_d < num_entries:
        d = uint32(first_d + cuda.threadIdx.x)
        tap = uint32(d // sizes.group_in)
        rest = uint32(tap // sizes.taps_2)
        shift_0 = int32(int32(rest // sizes.taps_1) * sizes.dilation_0)
        shift_1 = int32(int32(rest % sizes.taps_1) * sizes.dilation_1)
        shift_2 = int32(int32(tap % sizes.taps_2) * sizes.dilation_2)
        shift = int32(shift_0 * sizes.step_0 + shift_1 * sizes.step_1 + shift_2 * sizes.step_2)
        shift = int32(shift + int32(d % sizes.group_in))
        first = int64(cuda.blockIdx.y) * LOCATIONS
        while first < num_rows:
            count = uint32(LOCATIONS)
            if num_rows - first < LOCATIONS:
                count = uint32(num_rows - first)
            k = thread
            while k < count:
                n = (first + k) // int64(sizes.locations)
                o = uint32(first + k - n * int64(sizes.locations))
                rest = uint32(o // sizes.out_2)
                i_0 = int32(int32(rest // sizes.out_1) * sizes.stride_0 - sizes.before_0)
                i_1 = int32(int32(rest % sizes.out_1) * sizes.stride_1 - sizes.before_1)
                i_2 = int32(int32(o % sizes.out_2) * sizes.stride_2 - sizes.before_2)
                at = int32(i_0 * sizes.step_0 + i_1 * sizes.step_1 + i_2 * sizes.step_2)
                corner_0[k], corner_1[k], corner_2[k] = i_0, i_1, i_2
                corner[k] = n * sizes.step_case + at
                k = uint32(k + width * height)
            cuda.syncthreads()
            k = y
            while k < count:
                # Loads without branches, all of them before the first store.
                for i in range(_EACH):
                    here = uint32(k + i * height)
                    inside = here < count
                    here = here if inside else k
                    inside &= uint32(corner_0[here] + shift_0) < sizes.size_0
                    inside &= uint32(corner_1[here] + shift_1) < sizes.size_1
                    inside &= uint32(corner_2[here] + shift_2) < sizes.size_2
                    inside &= d < num_entries
                    value = images[uint64(corner[here] + shift) if inside else uint64(0)]
                    loaded[i] = value if inside else zero
                at = (first + k) * num_entries + d
                for i in range(_EACH):
                    if d < num_entries and k < count:
                        out[uint64(at)] = loaded[i]
                    k = uint32(k + height)
                    at += uint32(height * num_entries)
            cuda.syncthreads()
            first += int64(cuda.gridDim.y) * LOCATIONS
        first_d = uint32(first_d + cuda.gridDim.x * width)
