"""Operations on arrays that kernels may replace: patches and squared outer products.

Each op is its Array API reference; the registrations below name the kernels. Ops return sums over
cases; dividing by the number of cases is the business of ``moments``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from kfac_xp.backend import (
    Condition,
    KernelOp,
    array_namespace,
    as_statistics,
    device_of,
    require_one_place,
)
from kfac_xp.backend import is_one_float as _one_float
from kfac_xp.geometry import ConvGeometry, Padding, require_channels_last
from kfac_xp.linalg import append_homog
from kfac_xp.typing import Array

# Per-case gradients held at a time by the references, in elements: small enough for the cache,
# large enough that one matrix product per chunk is worth its call.
_CHUNK_ELEMENTS = 2**18


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
    padded = _pad(inputs, geometry.pads(space))
    views = [
        padded[
            (
                slice(None),
                *(
                    slice(tap * d, tap * d + s * (o - 1) + 1 if o else tap * d, s)
                    for tap, d, s, o in zip(
                        taps, geometry.dilation, geometry.strides, out, strict=True
                    )
                ),
                slice(None),
            )
        ]
        for taps in itertools.product(*(range(k) for k in geometry.kernel))
    ]
    return xp.reshape(xp.stack(views, axis=-2), (num_cases, *out, geometry.num_taps * channels))


@KernelOp
def squared_outer(rows: Array, grads: Array) -> Array:
    """Sum over cases of the elementwise square of each case's sum of outer products.

    ``out[d, c] = sum_n (sum_t rows[n, t, d] * grads[n, t, c]) ** 2``: the diagonal of the
    uncentred second moment of per-case gradients, before division by the number of cases.

    Parameters
    ----------
    rows : shape [N, D] or [N, T, D]
        Layer inputs, or patches with one row per location.
    grads : shape [N, C] or [N, T, C]
        Gradients of the preactivations, with as many axes as `rows`.

    Returns
    -------
    Array of shape [D, C], in at least float32.

    Raises
    ------
    ValueError
        If the shapes do not agree in N (and T), or the arrays are on several devices.
    TypeError
        If the arrays belong to several libraries.
    """
    xp = array_namespace(rows, grads)
    rows, grads = as_statistics(rows), as_statistics(grads)
    if rows.ndim == 2 or rows.shape[1] == 1:
        # With one location the square of an outer product is the outer product of the squares,
        # and the sum over cases a matrix product.
        flat_rows = xp.reshape(rows, (-1, rows.shape[-1]))
        flat_grads = xp.reshape(grads, (-1, grads.shape[-1]))
        return xp.matmul(xp.matrix_transpose(flat_rows * flat_rows), flat_grads * flat_grads)
    num_cases, _, d = rows.shape
    c = grads.shape[-1]
    total = xp.zeros((d, c), dtype=rows.dtype, device=device_of(rows))
    chunk = max(1, _CHUNK_ELEMENTS // max(1, d * c))
    for start in range(0, num_cases, chunk):
        stop = min(start + chunk, num_cases)
        case_grads = xp.matmul(xp.matrix_transpose(rows[start:stop, ...]), grads[start:stop, ...])
        total = total + xp.sum(case_grads * case_grads, axis=0)
    return total


@KernelOp
def conv_squared_outer(
    inputs: Array,
    outputs_grad: Array,
    geometry: ConvGeometry,
    *,
    has_bias: bool = False,
    patch_mask: Array | None = None,
) -> Array:
    """`squared_outer` of a convolution layer's patches, made from the layer's inputs.

    ``out = sum_n (sum_t outer(patch[n, t], outputs_grad[n, t])) ** 2``. Patches and per-case
    gradients exist for a few cases at a time only.

    Parameters
    ----------
    inputs : shape [N, *space, C_in]
    outputs_grad : shape [N, *out, C_out]
        Gradients of the preactivations; ``out = geometry.output_shape(space)``.
    geometry
        Filter, strides, dilation and padding.
    has_bias
        Append a 1 to each patch, so that the last row of the result belongs to the bias.
    patch_mask : shape [*kernel, C_in]
        Multiplies each patch (before the 1 is appended).

    Returns
    -------
    Array of shape [prod(kernel) * C_in (+ 1), C_out], in at least float32.

    Raises
    ------
    ValueError
        If a shape does not follow from the others, or the arrays are on several devices.
    TypeError
        If the arrays belong to several libraries.
    """
    xp = array_namespace(inputs, outputs_grad)
    inputs, grads = as_statistics(inputs), as_statistics(outputs_grad)
    num_cases, *space, channels = inputs.shape
    c_out = grads.shape[-1]
    d = geometry.num_taps * channels
    num_locations = geometry.num_locations(space)
    grads = xp.reshape(grads, (num_cases, num_locations, c_out))
    mask = None if patch_mask is None else xp.reshape(as_statistics(patch_mask), (d,))
    total = xp.zeros((d + has_bias, c_out), dtype=inputs.dtype, device=device_of(inputs))
    chunk = max(1, _CHUNK_ELEMENTS // max(1, d * max(c_out, num_locations)))
    for start in range(0, num_cases, chunk):
        stop = min(start + chunk, num_cases)
        patches = extract_patches.reference(inputs[start:stop, ...], geometry)
        patches = xp.reshape(patches, (stop - start, num_locations, d))
        if mask is not None:
            patches = patches * mask
        if has_bias:
            patches = append_homog(patches)
        total = total + squared_outer.reference(patches, grads[start:stop, ...])
    return total


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


# ---------------------------------------------------------------------------------------------
# Checks


@extract_patches.checks
def _check_extract_patches(inputs: Array, geometry: ConvGeometry) -> None:
    require_one_place(inputs=inputs)
    require_images("inputs", inputs, geometry)


@squared_outer.checks
def _check_squared_outer(rows: Array, grads: Array) -> None:
    require_one_place(rows=rows, grads=grads)
    if rows.ndim not in (2, 3) or grads.ndim != rows.ndim or rows.shape[:-1] != grads.shape[:-1]:
        raise ValueError(
            "`rows` and `grads` must have shapes [N, D] and [N, C], or [N, T, D] and [N, T, C]; "
            f"got {tuple(rows.shape)} and {tuple(grads.shape)}."
        )


@conv_squared_outer.checks
def _check_conv_squared_outer(
    inputs: Array,
    outputs_grad: Array,
    geometry: ConvGeometry,
    *,
    has_bias: bool = False,
    patch_mask: Array | None = None,
) -> None:
    masks = {} if patch_mask is None else {"patch_mask": patch_mask}
    require_one_place(inputs=inputs, outputs_grad=outputs_grad, **masks)
    require_images("inputs", inputs, geometry)
    leading = (inputs.shape[0], *geometry.output_shape(inputs.shape[1:-1]))
    if outputs_grad.ndim != inputs.ndim or tuple(outputs_grad.shape[:-1]) != leading:
        raise ValueError(
            f"`outputs_grad` must have shape {[*leading, 'C_out']}, as follows from `inputs` of "
            f"shape {tuple(inputs.shape)} and {geometry}; got {tuple(outputs_grad.shape)}."
        )
    mask_shape = (*geometry.kernel, inputs.shape[-1])
    if patch_mask is not None and tuple(patch_mask.shape) != mask_shape:
        raise ValueError(
            f"`patch_mask` must have the shape of a filter without its outputs, {mask_shape}; "
            f"got {tuple(patch_mask.shape)}."
        )


def require_images(name: str, images: Array, geometry: ConvGeometry) -> None:
    """Raise ValueError unless `images` is ``[N, *space, C]`` with the geometry's spatial axes."""
    if images.ndim != geometry.num_axes + 2:
        axes = ["N", *(f"size_{i}" for i in range(geometry.num_axes)), "C"]
        raise ValueError(
            f"`{name}` must have shape [{', '.join(axes)}] for a filter with "
            f"{geometry.num_axes} spatial axes; got shape {tuple(images.shape)}."
        )


def _pad(images: Array, pads: tuple[tuple[int, int], ...]) -> Array:
    """Zeros before and after each spatial axis."""
    xp = array_namespace(images)
    for axis, widths in enumerate(pads, start=1):
        if any(widths):
            before, after = (
                xp.zeros(
                    (*images.shape[:axis], width, *images.shape[axis + 1 :]),
                    dtype=images.dtype,
                    device=device_of(images),
                )
                for width in widths
            )
            images = xp.concat([before, images, after], axis=axis)
    return images


# ---------------------------------------------------------------------------------------------
# Kernels. `wins` follows benchmarks/results/kernels-cpu-2026-11-20.md (2 cores, 1 and 2 threads):
# a region is named where every size measured in it was at least 1.15 times as fast.


# Multiply-adds of one case up to which BLAS computes its product on one thread. The squared outer
# kernels are taken below it only: the bits of their results then do not depend on the number of
# threads. (They win above it, too, and can be forced.)
_ONE_THREAD = 2**18


def _few_locations(rows: Array, grads: Array) -> bool:
    if rows.ndim != 3 or not 2 <= rows.shape[1] <= 16 or grads.shape[-1] < 16:
        return False
    return math.prod(rows.shape[1:]) * grads.shape[-1] <= _ONE_THREAD


def _real_convolution(inputs: Array, outputs_grad: Array, geometry: ConvGeometry, **_: Any) -> bool:
    num_locations = geometry.num_locations(inputs.shape[1:-1])
    if geometry.num_taps == 1 or num_locations == 1:
        return False
    columns = geometry.num_taps * inputs.shape[-1]
    return num_locations * columns * outputs_grad.shape[-1] <= _ONE_THREAD


_CPU, _CUDA = "kfac_xp.kernels.cpu", "kfac_xp.kernels.cuda"
_UNMEASURED = Condition(
    "no sizes so far: it is still to be measured on a GPU", lambda *args, **kwargs: False
)
_PATCHES = Condition(
    "float32 or float64 with up to three spatial axes",
    lambda inputs, geometry: _one_float(inputs) and geometry.num_axes <= 3,
)
_ROWS = Condition(
    "arrays that are all float32 or all float64", lambda rows, grads: _one_float(rows, grads)
)
_CONVOLUTION = Condition(
    "arrays that are all float32 or all float64, with up to three spatial axes",
    lambda inputs, outputs_grad, geometry, *, has_bias=False, patch_mask=None: (
        _one_float(inputs, outputs_grad, patch_mask) and geometry.num_axes <= 3
    ),
)

# Measured 1.3 to 8 times as fast; with one tap, where the reference is one copy, 0.4 to 0.6.
_wins = Condition("filters of more than one tap", lambda inputs, geometry: geometry.num_taps > 1)
extract_patches.register("numba", f"{_CPU}.patches:extract_patches", accepts=_PATCHES, wins=_wins)
extract_patches.register(
    "cuda", f"{_CUDA}.patches:extract_patches", accepts=_PATCHES, wins=_UNMEASURED
)

# Measured 1.2 to 1.8 times as fast. With one location the reference is a single product, and ten
# to a hundred times as fast; with many, or few channels, both spend their time in BLAS.
_wins = Condition(
    "2 to 16 locations, at least 16 columns of `grads` and at most 2**18 multiply-adds per case",
    _few_locations,
)
squared_outer.register("numba", f"{_CPU}.squared_outer:squared_outer", accepts=_ROWS, wins=_wins)
squared_outer.register(
    "cuda", f"{_CUDA}.squared_outer:squared_outer", accepts=_ROWS, wins=_UNMEASURED
)

# Measured 1.4 to 2.6 times as fast. With one tap both spend their time in BLAS; with one location
# the reference is a single product.
_wins = Condition(
    "filters of more than one tap at more than one location, with at most 2**18 multiply-adds per "
    "case",
    _real_convolution,
)
conv_squared_outer.register(
    "numba", f"{_CPU}.squared_outer:conv_squared_outer", accepts=_CONVOLUTION, wins=_wins
)
conv_squared_outer.register(
    "cuda", f"{_CUDA}.squared_outer:conv_squared_outer", accepts=_CONVOLUTION, wins=_UNMEASURED
)
