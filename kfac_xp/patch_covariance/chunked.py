"""The second moment of patches from the patches themselves, some of them at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from kfac_xp.backend import array_namespace, itemsize
from kfac_xp.geometry import ConvGeometry
from kfac_xp.linalg import compute_cov
from kfac_xp.ops import extract_patches
from kfac_xp.patch_covariance.lattice import ranges
from kfac_xp.typing import Array


def chunked_covariance(
    inputs: Array,
    geometry: ConvGeometry,
    mask: Array | None,
    normalizer: float,
    workspace: int,
) -> Array:
    """Second moment [D, D] of the patches, ``D = prod(kernel) * C``, divided by `normalizer`.

    Parameters
    ----------
    inputs : shape [N, *space, C]
    geometry
        Filter, strides, dilation and padding.
    mask : shape [D], optional
        Multiplies each patch.
    normalizer
        What the sum over cases and locations is divided by.
    workspace
        Bytes for the patches that are held at a time; those of one line of one case's locations
        are held in any case, and as many as take the place of the result.
    """
    d = geometry.num_taps * inputs.shape[-1]
    if _patches_are_pixels(geometry, inputs.shape[1:-1]) and mask is None:
        rows = array_namespace(inputs).reshape(inputs, (-1, d))  # a view
        return compute_cov(rows, None, normalizer)
    # Fewer patches than fill an array of the result's size would not pay for adding it up.
    most_patches = max(workspace // itemsize(inputs) // d, d)
    total = None
    for part in _parts(inputs, geometry, most_patches):
        # Without a name for it, so that it is gone before the next one is made.
        if total is None:
            total = compute_cov(_patch_rows(*part, mask), None, normalizer)
        else:
            total += compute_cov(_patch_rows(*part, mask), None, normalizer)
    return total


def _patches_are_pixels(geometry: ConvGeometry, space: Sequence[int]) -> bool:
    """True for a filter of one tap that reads every pixel once."""
    ones = (1,) * geometry.num_axes
    return geometry.kernel == geometry.strides == ones and not any(map(any, geometry.pads(space)))


def _patch_rows(inputs: Array, geometry: ConvGeometry, mask: Array | None) -> Array:
    """All patches of all cases, [rows, D]."""
    patches = extract_patches(inputs, geometry)
    rows = array_namespace(inputs).reshape(patches, (-1, patches.shape[-1]))
    return rows if mask is None else rows * mask


def _parts(
    inputs: Array, geometry: ConvGeometry, most_patches: int
) -> Iterator[tuple[Array, ConvGeometry]]:
    """Some cases at a time, or some lines of one case: images, and the geometry on these."""
    space = inputs.shape[1:-1]
    per_case = geometry.num_locations(space)
    if inputs.shape[0] * per_case <= most_patches:
        yield inputs, geometry
        return
    cases = most_patches // per_case
    if cases > 0:
        for start, stop in ranges(inputs.shape[0], cases):
            yield inputs[start:stop, ...], geometry
        return
    lines, *_ = geometry.output_shape(space)
    at_once = max(1, most_patches * lines // per_case)
    for case, (start, stop) in itertools.product(range(inputs.shape[0]), ranges(lines, at_once)):
        first, last, own = geometry.lines(space, start, stop)
        yield inputs[case : case + 1, first:last, ...], own
