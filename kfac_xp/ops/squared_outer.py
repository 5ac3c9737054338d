"""Squared outer products: the diagonals of second moments of per-case gradients."""

from __future__ import annotations

import math
from typing import Any

from kfac_xp.backend import (
    UNMEASURED,
    Condition,
    KernelOp,
    array_namespace,
    as_statistics,
    device_of,
    is_one_float,
    require_one_place,
)
from kfac_xp.geometry import ConvGeometry
from kfac_xp.linalg import pad_with_zeros
from kfac_xp.ops.patches import (
    CPU,
    CUDA,
    extract_patches,
    has_few_entries,
    has_small_cases,
    require_images,
)
from kfac_xp.precision import of_statistics
from kfac_xp.typing import Array

# Per-case gradients held at a time by the references, in elements: small enough for the cache,
# large enough that one matrix product per chunk is worth its call.
_CHUNK_ELEMENTS = 2**18
# The same where each chunk reads a rotation of a million elements or more.
_ROTATED_ELEMENTS = 2**20
# With one location the sum over cases is a matrix product; it needs so many to be efficient.
_FULL_SUM = 256


@KernelOp
@of_statistics
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
@of_statistics
def conv_squared_outer(
    inputs: Array,
    outputs_grad: Array,
    geometry: ConvGeometry,
    *,
    has_bias: bool = False,
    patch_mask: Array | None = None,
    groups: int = 1,
    rotations: tuple[Array, Array] | None = None,
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
    patch_mask : shape [*kernel, C_in / groups]
        Multiplies each patch (before the 1 is appended).
    groups
        Input and output channels are split into so many consecutive groups, and a column of the
        result belongs to the inputs of its group. A depthwise convolution has C_in.
    rotations : shapes [prod(kernel) * C_in (+ 1), R] and [C_out, S]
        Multiply each patch (with its mask and its 1) and each gradient from the right, before
        the square: second moments in the Kronecker-factored eigenbasis, as EKFAC keeps them, for
        two matrices of eigenvectors in columns. Not with groups.

    Returns
    -------
    Array of shape [prod(kernel) * C_in / groups (+ 1), C_out], or [R, S] if rotated, in at least
    float32.

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
    c_out, d = grads.shape[-1], geometry.num_taps * channels // groups
    grads = xp.reshape(grads, (num_cases, geometry.num_locations(space), c_out))
    mask = None if patch_mask is None else xp.reshape(as_statistics(patch_mask), (d, 1))
    if rotations is not None:
        return _rotated_squares(inputs, grads, geometry, has_bias, mask, rotations)
    # At one pixel all taps but one of a 3x3 filter meet padding: their rows are zero.
    cropped, dropped = geometry.without_padding_taps(space)
    total = _squares(inputs, grads, cropped, groups)
    total = xp.reshape(total, (1, *cropped.kernel, channels // groups * c_out))
    total = xp.reshape(pad_with_zeros(total, dropped), (d, c_out))
    if mask is not None:
        # What multiplies a row of every case's gradient multiplies the squares twice.
        total = total * (mask * mask)
    if has_bias:
        sums = xp.sum(grads, axis=1)
        total = xp.concat([total, xp.sum(sums * sums, axis=0, keepdims=True)])
    return total


def _squares(inputs: Array, grads: Array, geometry: ConvGeometry, groups: int) -> Array:
    """The sum over cases, in chunks: shape [prod(kernel) * C_in / groups, C_out]."""
    xp = array_namespace(inputs, grads)
    channels = inputs.shape[-1]
    num_cases, num_locations, c_out = grads.shape
    d = geometry.num_taps * channels
    chunk = _CHUNK_ELEMENTS // max(1, d * max(c_out // groups, num_locations))
    chunk = max(_FULL_SUM if num_locations == 1 else 1, chunk)
    if groups == 1 and chunk >= num_cases:
        return squared_outer(_patch_rows(inputs, geometry), grads)
    total = xp.zeros((d // groups, c_out), dtype=inputs.dtype, device=device_of(inputs))
    for start in range(0, num_cases, chunk):
        stop = min(start + chunk, num_cases)
        rows, columns = _patch_rows(inputs[start:stop, ...], geometry), grads[start:stop, ...]
        if groups == 1:
            total = total + squared_outer(rows, columns)
            continue
        n, t = stop - start, num_locations
        rows = xp.reshape(rows, (n, t, geometry.num_taps, groups, channels // groups))
        rows = xp.permute_dims(rows, (0, 3, 2, 4, 1))
        rows = xp.reshape(rows, (n, groups, d // groups, t))
        columns = xp.reshape(columns, (n, t, groups, c_out // groups))
        columns = xp.permute_dims(columns, (0, 2, 1, 3))
        case_grads = xp.matmul(rows, columns)
        squares = xp.sum(case_grads * case_grads, axis=0)  # [groups, D / groups, C_out / groups]
        total = total + xp.reshape(xp.permute_dims(squares, (1, 0, 2)), total.shape)
    return total


def _rotated_squares(
    inputs: Array,
    grads: Array,
    geometry: ConvGeometry,
    has_bias: bool,
    mask: Array | None,
    rotations: tuple[Array, Array],
) -> Array:
    """``sum_n (u_in^T patches[n]^T grads[n] u_out) ** 2``, each factor applied where it is cheap.

    A rotation of D x R costs R * D multiplications for each of T patches, or for each of the C
    columns of the case's gradient.
    """
    xp = array_namespace(inputs, grads)
    u_in, u_out = (as_statistics(u) for u in rotations)
    num_cases, num_locations, c_out = grads.shape
    d = geometry.num_taps * inputs.shape[-1]
    # Mask and bias are taken over by the rotation: ``[patch * mask, 1] @ u = patch @ v + shift``.
    shift = u_in[d, :] if has_bias else None
    u_in = u_in[:d, :] if mask is None else u_in[:d, :] * mask
    total = xp.zeros((u_in.shape[1], u_out.shape[1]), dtype=inputs.dtype, device=device_of(inputs))
    chunk = max(1, _ROTATED_ELEMENTS // max(1, d * max(c_out, num_locations)))
    for start in range(0, num_cases, chunk):
        stop = min(start + chunk, num_cases)
        rows, columns = _patch_rows(inputs[start:stop, ...], geometry), grads[start:stop, ...]
        is_rotated = num_locations <= u_in.shape[1]
        if is_rotated:
            columns = _times(columns, u_out)
        if num_locations <= c_out:
            rows = _times(rows, u_in)
            rows = rows if shift is None else rows + shift
            if is_rotated:
                total = total + squared_outer(rows, columns)
                continue
            case_grads = xp.matmul(xp.matrix_transpose(rows), columns)
        else:
            case_grads = xp.matmul(xp.matrix_transpose(rows), columns)
            case_grads = xp.matmul(xp.matrix_transpose(u_in), case_grads)
            if shift is not None:
                case_grads = case_grads + shift[:, None] * xp.sum(columns, axis=1, keepdims=True)
        if not is_rotated:
            case_grads = _times(case_grads, u_out)
        total = total + xp.sum(case_grads * case_grads, axis=0)
    return total


def _times(stack: Array, matrix: Array) -> Array:
    """A stack of matrices [n, k, R] times one [R, S], as a single product."""
    xp = array_namespace(stack, matrix)
    n, k, r = stack.shape
    return xp.reshape(xp.matmul(xp.reshape(stack, (n * k, r)), matrix), (n, k, matrix.shape[1]))


def _patch_rows(inputs: Array, geometry: ConvGeometry) -> Array:
    """Patches of shape [N, T, D]; where they are the images themselves, nothing is copied."""
    num_cases, *space, channels = inputs.shape
    shape = (num_cases, geometry.num_locations(space), geometry.num_taps * channels)
    reads_once = (shape[1] == 1 and geometry.kernel == tuple(space)) or (
        geometry.num_taps == 1 and shape[1] == math.prod(space)
    )
    is_image = reads_once and not any(map(any, geometry.pads(space)))
    xp = array_namespace(inputs)
    return xp.reshape(inputs if is_image else extract_patches(inputs, geometry), shape)


# ---------------------------------------------------------------------------------------------
# Checks


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
    groups: int = 1,
    rotations: tuple[Array, Array] | None = None,
) -> None:
    masks = {} if patch_mask is None else {"patch_mask": patch_mask}
    pair = {f"rotations[{i}]": u for i, u in enumerate(rotations or ())}
    require_one_place(inputs=inputs, outputs_grad=outputs_grad, **masks, **pair)
    require_images("inputs", inputs, geometry)
    leading = (inputs.shape[0], *geometry.output_shape(inputs.shape[1:-1]))
    if outputs_grad.ndim != inputs.ndim or tuple(outputs_grad.shape[:-1]) != leading:
        raise ValueError(
            f"`outputs_grad` must have shape {[*leading, 'C_out']}, as follows from `inputs` of "
            f"shape {tuple(inputs.shape)} and {geometry}; got {tuple(outputs_grad.shape)}."
        )
    channels, c_out = inputs.shape[-1], outputs_grad.shape[-1]
    if groups < 1 or channels % groups or c_out % groups:
        raise ValueError(
            f"`groups` must divide the {channels} channels of `inputs` and the {c_out} of "
            f"`outputs_grad`; got {groups}."
        )
    mask_shape = (*geometry.kernel, channels // groups)
    if patch_mask is not None and tuple(patch_mask.shape) != mask_shape:
        raise ValueError(
            f"`patch_mask` must have the shape of a filter without its outputs, {mask_shape}; "
            f"got {tuple(patch_mask.shape)}."
        )
    if rotations is not None:
        _check_rotations(pair, (geometry.num_taps * channels + has_bias, c_out), groups)


def _check_rotations(pair: dict[str, Array], sizes: tuple[int, int], groups: int) -> None:
    if groups != 1:
        raise ValueError(
            f"`rotations` are of whole patches and need `groups`=1; got {groups} groups. Call once "
            "per group, with the group's channels."
        )
    shapes = [tuple(u.shape) for u in pair.values()]
    if len(shapes) != 2 or any(
        len(s) != 2 or s[0] != size for s, size in zip(shapes, sizes, strict=False)
    ):
        raise ValueError(
            f"`rotations` must be two matrices of {sizes[0]} rows (entries of a patch, with 1 for "
            f"a bias) and {sizes[1]} rows (channels of `outputs_grad`); got shapes {shapes}."
        )


# ---------------------------------------------------------------------------------------------
# Kernels. `wins` follows benchmarks/results/squared-outer-cpu-2026-11-20.md: a region is named
# where every size measured in it was at least 1.15 times as fast. The bits of the kernels do
# not depend on the number of threads; the references' are those of the library's matrix product.


def _accepts(
    inputs: Array,
    outputs_grad: Array,
    geometry: ConvGeometry,
    *,
    has_bias: bool = False,
    patch_mask: Array | None = None,
    groups: int = 1,
    rotations: tuple[Array, Array] | None = None,
) -> bool:
    is_float = is_one_float(inputs, outputs_grad, patch_mask)
    return is_float and geometry.num_axes <= 3 and rotations is None


def _accepts_on_cuda(
    inputs: Array,
    outputs_grad: Array,
    geometry: ConvGeometry,
    *,
    patch_mask: Array | None = None,
    rotations: tuple[Array, Array] | None = None,
    **options: Any,
) -> bool:
    is_float = is_one_float(inputs, outputs_grad, patch_mask, half=True)
    is_small = has_small_cases(inputs, geometry) and has_few_entries(inputs, outputs_grad)
    return is_float and is_small and geometry.num_axes <= 3 and rotations is None


def _few_locations(rows: Array, grads: Array) -> bool:
    if rows.ndim != 3 or rows.shape[1] < 2:
        return False
    locations, d, c = rows.shape[1], rows.shape[-1], grads.shape[-1]
    return (locations <= 16 and c >= 16) or (locations <= 64 and d * c >= 2**18)


def _several_locations(inputs: Array, _: Array, geometry: ConvGeometry, **options: Any) -> bool:
    return geometry.num_locations(inputs.shape[1:-1]) > 1


_ROWS = Condition(
    "arrays that are all float32 or all float64", lambda rows, grads: is_one_float(rows, grads)
)
# Measured 1.2 to 10 times as fast. With one location the reference is a single product; with many
# both do little else than multiply, and BLAS can use several threads for one product.
_WINS = Condition(
    "2 to 16 locations and at least 16 columns of `grads`, or up to 64 locations and 2**18 "
    "entries of the result",
    _few_locations,
)
squared_outer.register("numba", f"{CPU}.squared_outer:squared_outer", accepts=_ROWS, wins=_WINS)
_ON_CUDA = (
    "arrays that are all float16, all float32 or all float64, of less than 2**31 entries each"
)
squared_outer.register(
    "cuda",
    f"{CUDA}.squared_outer:squared_outer",
    accepts=Condition(
        _ON_CUDA,
        lambda rows, grads: is_one_float(rows, grads, half=True) and has_few_entries(rows, grads),
    ),
    wins=UNMEASURED,
)

# Measured 1.25 to 24 times as fast. With one location the reference is a single product.
_WORDS = "arrays that are all float32 or all float64, with up to three spatial axes, not rotated"
conv_squared_outer.register(
    "numba",
    f"{CPU}.squared_outer:conv_squared_outer",
    accepts=Condition(_WORDS, _accepts),
    wins=Condition("several locations", _several_locations),
)
conv_squared_outer.register(
    "cuda",
    f"{CUDA}.squared_outer:conv_squared_outer",
    accepts=Condition(f"{_ON_CUDA}, with up to three spatial axes, not rotated", _accepts_on_cuda),
    wins=UNMEASURED,
)
