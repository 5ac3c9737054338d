"""Sums of squared outer products on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.three_axes import three_axes

# Rows of the result that are worked out together, from one reading of the gradients.
_ROWS = 4
# Locations are filled up with zeros to a multiple of this: whole vectors, no scalar remainder.
_LANES = 16


def squared_outer(rows: Any, grads: Any) -> Any:
    """See ``kfac_xp.ops.squared_outer``."""
    if rows.ndim == 2:
        rows, grads = rows[:, None, :], grads[:, None, :]
    rows, grads = np.ascontiguousarray(rows), np.ascontiguousarray(grads)
    if rows.shape[-1] > grads.shape[-1]:
        # The inner loop runs along the second operand: the longer one.
        return np.ascontiguousarray(squared_outer(grads, rows).T)
    out = np.empty((rows.shape[-1], grads.shape[-1]), dtype=rows.dtype)
    _fill(rows, grads, out)
    return out


def conv_squared_outer(
    inputs: Any,
    outputs_grad: Any,
    geometry: Any,
    *,
    has_bias: bool = False,
    patch_mask: Any | None = None,
) -> Any:
    """See ``kfac_xp.ops.conv_squared_outer``."""
    num_cases, *space, channels = inputs.shape
    axes = three_axes(geometry, tuple(space))
    d = axes.kernel[0] * axes.kernel[1] * axes.kernel[2] * channels
    mask = np.ones(d, dtype=inputs.dtype) if patch_mask is None else patch_mask
    out = np.empty((d + has_bias, outputs_grad.shape[-1]), dtype=inputs.dtype)
    _fill_conv(
        np.ascontiguousarray(inputs).reshape(num_cases, *axes.space, channels),
        np.ascontiguousarray(outputs_grad).reshape(num_cases, *axes.out, out.shape[1]),
        np.ascontiguousarray(mask).reshape(d),
        axes.kernel,
        axes.strides,
        axes.dilation,
        axes.before,
        axes.padded,
        out,
    )
    return out


@compiled
def _fill(rows, grads, out):
    """Write every element of `out` [D, C], four rows at a time, cases in order within each.

    The per-case gradient exists for four rows of one case. Cases run inside rows: with few
    locations, what costs is to go through ``[D, C]`` once per case, not the products.
    """
    num_cases, num_locations, d = rows.shape
    tile = np.zeros((num_locations, _ROWS), out.dtype)
    case_grad = np.empty((_ROWS, out.shape[1]), out.dtype)
    out[:] = 0
    for first in range(0, d, _ROWS):
        num_rows = min(_ROWS, d - first)
        tile[:] = 0
        for n in range(num_cases):
            for t in range(num_locations):
                for i in range(num_rows):
                    tile[t, i] = rows[n, t, first + i]
            for i in range(_ROWS):
                for c in range(out.shape[1]):
                    case_grad[i, c] = 0
            in_fours = num_locations // 4 * 4
            for t in range(0, in_fours, 4):
                _add_four_locations(tile[t : t + 4], grads[n, t : t + 4], case_grad)
            for t in range(in_fours, num_locations):
                _add_location(tile[t], grads[n, t], case_grad)
            for i in range(num_rows):
                for c in range(out.shape[1]):
                    out[np.uintp(first) + np.uintp(i), c] += case_grad[i, c] * case_grad[i, c]


@compiled
def _add_four_locations(rows, grads, out):
    """``out[i, c] += sum_t rows[t, i] * grads[t, c]`` for four rows and four locations.

    Written out, so that `out` is read and written once for four products.
    """
    r_00, r_01, r_02, r_03 = rows[0, 0], rows[0, 1], rows[0, 2], rows[0, 3]
    r_10, r_11, r_12, r_13 = rows[1, 0], rows[1, 1], rows[1, 2], rows[1, 3]
    r_20, r_21, r_22, r_23 = rows[2, 0], rows[2, 1], rows[2, 2], rows[2, 3]
    r_30, r_31, r_32, r_33 = rows[3, 0], rows[3, 1], rows[3, 2], rows[3, 3]
    for c in range(out.shape[1]):
        g_0, g_1, g_2, g_3 = grads[0, c], grads[1, c], grads[2, c], grads[3, c]
        out[0, c] += r_00 * g_0 + r_10 * g_1 + r_20 * g_2 + r_30 * g_3
        out[1, c] += r_01 * g_0 + r_11 * g_1 + r_21 * g_2 + r_31 * g_3
        out[2, c] += r_02 * g_0 + r_12 * g_1 + r_22 * g_2 + r_32 * g_3
        out[3, c] += r_03 * g_0 + r_13 * g_1 + r_23 * g_2 + r_33 * g_3


@compiled
def _add_location(row, grad, out):
    """``out[i, c] += row[i] * grad[c]`` for four rows."""
    r_0, r_1, r_2, r_3 = row[0], row[1], row[2], row[3]
    for c in range(out.shape[1]):
        g = grad[c]
        out[0, c] += r_0 * g
        out[1, c] += r_1 * g
        out[2, c] += r_2 * g
        out[3, c] += r_3 * g


@compiled
def _fill_conv(inputs, grads, mask, kernel, strides, dilation, before, padded, out):
    """Write every element of `out` [D (+ 1), C_out], adding up cases in order.

    Each case is turned to channels first, images in a zero border and gradients as lines over
    locations. Then an entry of the per-case gradient is the dot product of two lines: a patch
    entry over all locations, and the gradient of one channel. Lines of patch entries exist for
    four entries of one case.
    """
    num_cases, size_0, size_1, size_2, channels = inputs.shape
    _, out_0, out_1, out_2, c_out = grads.shape
    num_locations = out_0 * out_1 * out_2
    length = (num_locations + _LANES - 1) // _LANES * _LANES
    images = np.zeros((channels, padded[0], padded[1], padded[2]), out.dtype)
    lines = np.zeros((_ROWS, length), out.dtype)
    # An even number of gradients, since they are taken in pairs.
    grad_lines = np.zeros((c_out + c_out % 2, length), out.dtype)
    out[:] = 0
    for n in range(num_cases):
        for i_0 in range(size_0):
            for i_1 in range(size_1):
                for i_2 in range(size_2):
                    for c in range(channels):
                        images[c, before[0] + i_0, before[1] + i_1, before[2] + i_2] = inputs[
                            n, i_0, i_1, i_2, c
                        ]
        case_grads = grads[n].reshape((num_locations, c_out))
        for t in range(num_locations):
            for c in range(c_out):
                grad_lines[c, t] = case_grads[t, c]
        for first in range(0, out.shape[0], _ROWS):
            for i in range(_ROWS):
                entry = first + i
                line = lines[i, :num_locations].reshape((out_0, out_1, out_2))
                if entry < mask.shape[0]:
                    tap, c = entry // channels, entry % channels
                    tap_0 = tap // (kernel[1] * kernel[2])
                    tap_1 = tap // kernel[2] % kernel[1]
                    tap_2 = tap % kernel[2]
                    corner = (tap_0 * dilation[0], tap_1 * dilation[1], tap_2 * dilation[2])
                    _gather_line(images[c], corner, strides, mask[entry], line)
                else:
                    # The bias sees a one at every location; beyond it there is nothing.
                    line[:] = 1 if entry < out.shape[0] else 0
            _add_squared_products(lines, grad_lines, out[first : first + _ROWS])


@compiled
def _gather_line(image, corner, strides, factor, line):
    """One patch entry at every location: `image` from `corner` on in `strides`, times `factor`."""
    step = np.uintp(strides[2])
    for o_0 in range(line.shape[0]):
        i_0 = np.uintp(corner[0] + o_0 * strides[0])
        for o_1 in range(line.shape[1]):
            i_1 = np.uintp(corner[1] + o_1 * strides[1])
            start = np.uintp(corner[2])
            if step == 1:
                for o_2 in range(np.uintp(line.shape[2])):
                    line[o_0, o_1, o_2] = image[i_0, i_1, start + o_2] * factor
            else:
                for o_2 in range(np.uintp(line.shape[2])):
                    line[o_0, o_1, o_2] = image[i_0, i_1, start + o_2 * step] * factor


@compiled
def _add_squared_products(lines, grad_lines, out):
    """``out[i, c] += dot(lines[i], grad_lines[c]) ** 2`` for up to four rows of `out`.

    Four lines by two: eight sums and the six operands stay in registers on any x86-64 or Arm.
    """
    num_rows, c_out = out.shape
    zero = out.dtype.type(0)
    for c in range(0, c_out, 2):
        s_00 = s_01 = s_10 = s_11 = s_20 = s_21 = s_30 = s_31 = zero
        for t in range(lines.shape[1]):
            g_0, g_1 = grad_lines[np.uintp(c), t], grad_lines[np.uintp(c + 1), t]
            p_0, p_1, p_2, p_3 = lines[0, t], lines[1, t], lines[2, t], lines[3, t]
            s_00 += p_0 * g_0
            s_01 += p_0 * g_1
            s_10 += p_1 * g_0
            s_11 += p_1 * g_1
            s_20 += p_2 * g_0
            s_21 += p_2 * g_1
            s_30 += p_3 * g_0
            s_31 += p_3 * g_1
        sums = ((s_00, s_01), (s_10, s_11), (s_20, s_21), (s_30, s_31))
        for i in range(num_rows):
            out[i, c] += sums[i][0] * sums[i][0]
            if c + 1 < c_out:
                out[i, c + 1] += sums[i][1] * sums[i][1]
