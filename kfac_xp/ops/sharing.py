"""Images and patches of layers that share weights: transposed convolutions, means of patches."""

from __future__ import annotations

import math

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.geometry import ConvGeometry, TransposedConvGeometry
from kfac_xp.linalg import pad_with_zeros
from kfac_xp.ops.patches import extract_patches, require_images, tap_views
from kfac_xp.typing import Array


def spread_images(inputs: Array, geometry: TransposedConvGeometry) -> Array:
    """The images under whose patches a transposed convolution is an ordinary one, of stride 1.

    ``stride - 1`` zeros between neighbouring pixels, and all axes turned round, so that taps keep
    their order: location o of ``geometry.of_spread`` is output ``size - 1 - o`` of the layer. What
    no output reads is cut off.

    Parameters
    ----------
    inputs : shape [N, *space, C_in]
    geometry
        For the same number of spatial axes.

    Returns
    -------
    Array of shape [N, *spread, C_in].
    """
    require_images("inputs", inputs, geometry.adjoint)
    xp = array_namespace(inputs)
    images = xp.flip(inputs, axis=tuple(range(1, inputs.ndim - 1)))
    for axis, stride in enumerate(geometry.adjoint.strides, start=1):
        images = _spread(images, axis, stride)
    cuts = [(max(-before, 0), max(-after, 0)) for before, after in geometry.spread_pads]
    kept = [slice(b, n - a) for (b, a), n in zip(cuts, images.shape[1:-1], strict=True)]
    return images[(slice(None), *kept, slice(None))]


def turned_round(images: Array) -> Array:
    """Images or gradients [N, *space, C] with all spatial axes turned round."""
    return array_namespace(images).flip(images, axis=tuple(range(1, images.ndim - 1)))


def extract_transposed_patches(inputs: Array, geometry: TransposedConvGeometry) -> Array:
    """What each output of a transposed convolution is made of, one row per location.

    ``patches[n, *o, (tap, c)] = inputs[n, *i, c]`` where ``i * stride + tap * dilation - before``
    is o for some pixel i, zero elsewhere. With the kernel [*kernel, C_in, C_out] reshaped to
    [-1, C_out], ``patches @ kernel`` is the layer, and ``patches^T @ outputs_grad``, summed over
    locations, the gradient of the kernel.

    Parameters
    ----------
    inputs : shape [N, *space, C_in]
    geometry
        For the same number of spatial axes.

    Returns
    -------
    Array of shape [N, *out, prod(kernel) * C_in].
    """
    return turned_round(extract_patches(spread_images(inputs, geometry), geometry.of_spread))


def mean_patches(inputs: Array, geometry: ConvGeometry) -> Array:
    """Mean over locations of each case's patches: shape [N, prod(kernel) * C_in].

    Sums of views of the images; no patches are made.
    """
    xp = array_namespace(inputs)
    num_cases, *space, channels = inputs.shape
    padded = pad_with_zeros(inputs, geometry.pads(space))
    axes = tuple(range(1, inputs.ndim - 1))
    views = tap_views(padded, geometry, geometry.output_shape(space))
    sums = xp.stack([xp.sum(view, axis=axes) for view in views], axis=1)
    rows = xp.reshape(sums, (num_cases, geometry.num_taps * channels))
    return rows / math.prod(geometry.output_shape(space))


def _spread(images: Array, axis: int, stride: int) -> Array:
    """Zeros between the pixels along one axis."""
    if stride == 1:
        return images
    xp = array_namespace(images)
    before, n, after = images.shape[:axis], images.shape[axis], images.shape[axis + 1 :]
    zeros = xp.zeros((*before, n, stride - 1, *after), dtype=images.dtype, device=device_of(images))
    pixels = xp.reshape(images, (*before, n, 1, *after))
    spread = xp.reshape(xp.concat([pixels, zeros], axis=axis + 1), (*before, n * stride, *after))
    return spread[(*(slice(None),) * axis, slice(0, (n - 1) * stride + 1), ...)]
