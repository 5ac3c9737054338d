"""Image patches, and the checks and conditions that the ops share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from kfac_xp.backend import (
    UNMEASURED,
    Condition,
    KernelOp,
    array_namespace,
    is_one_float,
    require_one_place,
)
from kfac_xp.geometry import ConvGeometry, Padding, require_channels_last
from kfac_xp.linalg import pad_with_zeros
from kfac_xp.typing import Array

CPU, CUDA = "kfac_xp.kernels.cpu", "kfac_xp.kernels.cuda"


@KernelOp
def extract_patches(inputs: Array, geometry: ConvGeometry) -> Array:
    """Image patches under a convolution filter, one row per location.

    ``patches[n, *o, (tap, c)] = padded[n, *(o * strides + tap * dilation), c]``, with zeros where
    a patch reaches over the border; taps are in row-major order, channels innermost, as in a
    kernel ``[*kernel, C_in, C_out]`` reshaped to ``[-1, C_out]``.

    Parameters
    ----------
    inputs : shape [N, *space, C_in]
        Images of any number of spatial axes, channels last.
    geometry
        Filter, strides, dilation and padding, for the same number of axes.

    Returns
    -------
    Array of shape [N, *out, prod(kernel) * C_in].

    Raises
    ------
    ValueError
        If `inputs` does not have ``geometry.num_axes`` spatial axes.
    """
    xp = array_namespace(inputs)
    num_cases, *space, channels = inputs.shape
    out = geometry.output_shape(space)
    padded = pad_with_zeros(inputs, geometry.pads(space))
    views = list(tap_views(padded, geometry, out))
    return xp.reshape(xp.stack(views, axis=-2), (num_cases, *out, geometry.num_taps * channels))


def tap_views(padded: Array, geometry: ConvGeometry, out: Sequence[int]) -> Iterator[Array]:
    """For each tap in row-major order, what it reads at all locations: views [N, *out, C_in]."""
    for taps in itertools.product(*(range(k) for k in geometry.kernel)):
        read = (
            slice(tap * d, tap * d + s * (o - 1) + 1 if o else tap * d, s)
            for tap, d, s, o in zip(taps, geometry.dilation, geometry.strides, out, strict=True)
        )
        yield padded[(slice(None), *read, slice(None))]


def extract_convolution_patches(
    inputs: Array,
    filter_shape: Sequence[int],
    padding: Padding = "SAME",
    strides: Sequence[int] | None = None,
    dilation_rate: Sequence[int] | None = None,
    data_format: str | None = None,
) -> Array:
    """`extract_patches` in the reference's form: shape [N, *out, *kernel, C_in].

    Parameters
    ----------
    inputs : shape [N, *space, C_in]
    filter_shape
        ``(*kernel, C_in, C_out)``.
    padding, strides, dilation_rate
        As for `ConvGeometry.create`.
    data_format
        None or a name that ends in "C".
    """
    require_channels_last(data_format)
    *kernel, channels, _ = filter_shape
    geometry = ConvGeometry.create(kernel, strides, padding, dilation_rate)
    patches = extract_patches(inputs, geometry)
    return array_namespace(inputs).reshape(patches, (*patches.shape[:-1], *kernel, channels))


def extract_image_patches(
    inputs: Array,
    filter_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    dilation_rate: Sequence[int] | None = None,
    padding: Padding = "SAME",
) -> Array:
    """`extract_patches` over two axes: shape [N, oh, ow, kh * kw * C_in]."""
    if len(filter_shape) != 4:
        raise ValueError(
            "`filter_shape` must be (kh, kw, C_in, C_out); "
            f"got {tuple(filter_shape)}. `extract_convolution_patches` takes any number of axes."
        )
    geometry = ConvGeometry.create(filter_shape[:-2], strides, padding, dilation_rate)
    return extract_patches(inputs, geometry)


def extract_pointwise_conv2d_patches(inputs: Array, filter_shape: Sequence[int]) -> Array:
    """The patches of a 1x1 filter, which are the pixels: shape [N, h, w, 1, 1, C_in]."""
    if inputs.ndim != 4 or len(filter_shape) != 4 or tuple(filter_shape)[:2] != (1, 1):
        raise ValueError(
            "`inputs` must have shape [N, h, w, C_in] and `filter_shape` must be (1, 1, C_in, "
            f"C_out); got {tuple(inputs.shape)} and {tuple(filter_shape)}."
        )
    return inputs[:, :, :, None, None, :]


@extract_patches.checks
def _check_extract_patches(inputs: Array, geometry: ConvGeometry) -> None:
    require_one_place(inputs=inputs)
    require_images("inputs", inputs, geometry)


def require_images(name: str, images: Array, geometry: ConvGeometry) -> None:
    """Raise ValueError unless `images` is ``[N, *space, C]`` with the geometry's spatial axes."""
    if images.ndim != geometry.num_axes + 2:
        axes = ["N", *(f"size_{i}" for i in range(geometry.num_axes)), "C"]
        raise ValueError(
            f"`{name}` must have shape [{', '.join(axes)}] for a filter with "
            f"{geometry.num_axes} spatial axes; got shape {tuple(images.shape)}."
        )


def has_small_cases(x: Array, geometry: ConvGeometry) -> bool:
    """True if integers of 32 bits number what there is of one case, with the geometry's padding."""
    *space, channels = x.shape[1:]
    padded = [n + sum(pair) for n, pair in zip(space, geometry.pads(space), strict=True)]
    return math.prod(padded) * channels < 2**31


def has_few_entries(*arrays: Array) -> bool:
    """True if integers of 32 bits number the entries of each."""
    return all(math.prod(a.shape) < 2**31 for a in arrays)


_ACCEPTED = Condition(
    "float32 or float64 with up to three spatial axes",
    lambda inputs, geometry: is_one_float(inputs) and geometry.num_axes <= 3,
)
# benchmarks/results/kernels-cpu-2026-11-20.md: 1.3 to 8 times as fast; with one tap, where the
# reference is one copy, 0.4 to 0.6.
_WINS = Condition("filters of more than one tap", lambda inputs, geometry: geometry.num_taps > 1)
extract_patches.register("numba", f"{CPU}.patches:extract_patches", accepts=_ACCEPTED, wins=_WINS)
_ACCEPTED_ON_CUDA = Condition(
    "float16, float32 or float64 with up to three spatial axes, less than 2**31 entries, and "
    "as few a case with its padding",
    lambda inputs, geometry: (
        is_one_float(inputs, half=True)
        and geometry.num_axes <= 3
        and has_few_entries(inputs)
        and has_small_cases(inputs, geometry)
    ),
)
extract_patches.register(
    "cuda", f"{CUDA}.patches:extract_patches", accepts=_ACCEPTED_ON_CUDA, wins=UNMEASURED
)
