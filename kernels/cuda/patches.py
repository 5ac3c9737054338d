"""Patch extraction on CUDA devices."""

from __future__ import annotations

import math
from typing import Any

from numba import cuda
from numpy import int32, int64, uint32, uint64

from kfac_xp.kernels.cuda.launch import bits_on_device, configured, current_stream, num_blocks
from kfac_xp.kernels.cuda.sizes import sizes_of
from kfac_xp.kernels.cuda.vectors import ALIGNS, VECTOR, vectors
from kfac_xp.kernels.three_axes import three_axes

# Locations whose corners a block computes at a time, and loads that a thread issues before it
# stores anything.
LOCATIONS = 64
_EACH = 4
_CORNER, _ = vectors("int32", 4)
_CORNERS = LOCATIONS + 1  # the last is that of what is beyond the locations
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
            images = cupy.ascontiguousarray(inputs if inputs.size else out).reshape(-1)
            patches = out.reshape(-1)
            # Neighbouring channels are moved together, up to 8 bytes.
            pixel = channels * images.itemsize
            width = math.gcd(8, pixel, images.data.ptr)
            images, patches = images.view(f"u{width}"), patches.view(f"u{width}")
            images, patches = bits_on_device(images, patches)
            moved = images, sizes_of(axes, num_cases, pixel // width), patches
            launch(*moved, stream=current_stream())
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
    # Along each axis, and in memory.
    if ALIGNS:
        corners = cuda.shared.array(_CORNERS, _CORNER, VECTOR)
    else:
        corners = cuda.shared.array(_CORNERS, _CORNER)
    loaded = cuda.local.array(_EACH, out.dtype)
    zero = out.dtype.type(0)
    width, height = uint32(cuda.blockDim.x), uint32(cuda.blockDim.y)
    y = uint32(cuda.threadIdx.y)
    thread = uint32(y * width + cuda.threadIdx.x)
    num_rows = int64(sizes.cases) * int64(sizes.locations)
    num_entries = uint32(sizes.entries)
    step = uint64(uint32(height * num_entries))
    first_d = uint32(cuda.blockIdx.x * width)
    # A block steps as a whole: all its threads meet at the barriers.
    while first_d < num_entries:
        d = uint32(first_d + cuda.threadIdx.x)
        is_entry = d < num_entries
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
            while k <= uint32(LOCATIONS):
                n = (first + k) // int64(sizes.locations)
                o = uint32(first + k - n * int64(sizes.locations))
                rest = uint32(o // sizes.out_2)
                i_0 = int32(int32(rest // sizes.out_1) * sizes.stride_0 - sizes.before_0)
                i_1 = int32(int32(rest % sizes.out_1) * sizes.stride_1 - sizes.before_1)
                i_2 = int32(int32(o % sizes.out_2) * sizes.stride_2 - sizes.before_2)
                at = int32(i_0 * sizes.step_0 + i_1 * sizes.step_1 + i_2 * sizes.step_2)
                corner = corners[uint64(k)]["v"]
                # From there no tap reaches the image.
                corner[0] = i_0 if k < count else int32(-(2**31))
                corner[1], corner[2], corner[3] = i_1, i_2, int32(int32(n) * sizes.step_case + at)
                k = uint32(k + width * height)
            cuda.syncthreads()
            k = y
            at = uint64(first + k) * uint64(num_entries) + uint64(d)
            while k < count:
                # All loads before the first store.
                for i in range(_EACH):
                    here = uint32(k + i * height)
                    here = here if here < uint32(LOCATIONS) else uint32(LOCATIONS)
                    corner = corners[uint64(here)]["v"]
                    inside = is_entry
                    inside &= uint32(corner[0] + shift_0) < sizes.size_0
                    inside &= uint32(corner[1] + shift_1) < sizes.size_1
                    inside &= uint32(corner[2] + shift_2) < sizes.size_2
                    loaded[i] = zero
                    if inside:
                        loaded[i] = images[uint64(uint32(corner[3] + shift))]
                for i in range(_EACH):
                    if is_entry and k < count:
                        out[at] = loaded[i]
                    k = uint32(k + height)
                    at += step
            cuda.syncthreads()
            first += int64(cuda.gridDim.y) * LOCATIONS
        first_d = uint32(first_d + cuda.gridDim.x * width)
