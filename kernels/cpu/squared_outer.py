"""Sums of squared outer products on the CPU: what `products` computes, in the ops' shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.blocks import ROWS, lanes
from kfac_xp.kernels.cpu.products import add_depthwise_squares, add_squares, add_squares_of_sums
from kfac_xp.kernels.cpu.threads import run_in_parts
from kfac_xp.kernels.three_axes import ThreeAxes, three_axes

# Elements copied at a time, of at least one case. Measured with 2**14 to 2**18: nearly flat.
_CHUNK_ELEMENTS = 2**17


def squared_outer(rows: Any, grads: Any) -> Any:
    """See ``kfac_xp.ops.squared_outer``."""
    if rows.ndim == 2:
        rows, grads = rows[:, None, :], grads[:, None, :]
    # Rows are the pixels of an image under a filter of one tap.
    num_cases, num_locations, d = rows.shape
    line, one = (1, 1, num_locations), (1, 1, 1)
    axes = ThreeAxes(line, line, one, one, one, (0, 0, 0), line)
    return _squares(rows.reshape(num_cases, *line, d), grads, axes)


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
    images = inputs.reshape(num_cases, *axes.space, channels)
    grads = outputs_grad.reshape(num_cases, math.prod(axes.out), outputs_grad.shape[-1])
    if groups == 1:
        out = _squares(images, grads, axes)
    elif groups == channels:
        out = _depthwise_squares(images, grads, axes)
    else:
        parts = zip(
            np.split(images, groups, axis=-1), np.split(grads, groups, axis=-1), strict=True
        )
        out = np.concatenate([_squares(*part, axes) for part in parts], axis=1)
    if patch_mask is not None:
        # A number that multiplies a row of every case's product multiplies its squares twice.
        out *= np.square(patch_mask.reshape(-1, 1))
    if has_bias:
        bias = np.zeros((1, grads.shape[-1]), dtype=out.dtype)
        add_squares_of_sums(np.ascontiguousarray(grads), bias[0])
        out = np.concatenate([out, bias])
    return out


def _squares(images: Any, grads: Any, axes: ThreeAxes) -> Any:
    """``sum_n (patches[n]^T grads[n]) ** 2`` of images [N, *space, C] and grads [N, T, C_out]."""
    images, grads = np.ascontiguousarray(images), np.ascontiguousarray(grads)
    d, c_out = math.prod(axes.kernel) * images.shape[-1], grads.shape[-1]
    width = lanes(images.dtype)
    blocks, panels = -(-d // ROWS), -(-c_out // width)
    out = np.zeros((blocks, panels, ROWS, width), dtype=images.dtype)
    if out.size and grads.size:
        chunk = _cases_in_chunk(images, grads, axes)
        run_in_parts(
            lambda first, last: add_squares(images, grads, tuple(axes), out, first, last, chunk),
            count=blocks,
            work=grads.shape[0] * grads.shape[1] * out.size,
        )
    out = out.transpose(0, 2, 1, 3).reshape(blocks * ROWS, panels * width)
    return np.ascontiguousarray(out[:d, :c_out])


def _depthwise_squares(images: Any, grads: Any, axes: ThreeAxes) -> Any:
    """The same for filters of one channel each: shape [taps, C_out]."""
    images, grads = np.ascontiguousarray(images), np.ascontiguousarray(grads)
    out = np.zeros((math.prod(axes.kernel), grads.shape[-1]), dtype=images.dtype)
    if out.size and grads.size:
        chunk = _cases_in_chunk(images, grads, axes)
        arguments = (images, grads, tuple(axes), out)
        run_in_parts(
            lambda first, last: add_depthwise_squares(*arguments, first, last, chunk),
            count=out.shape[0],
            work=grads.size * out.shape[0],
        )
    return out


def _cases_in_chunk(images: Any, grads: Any, axes: ThreeAxes) -> int:
    per_case = math.prod(axes.padded) * images.shape[-1] + math.prod(grads.shape[1:])
    return max(1, min(images.shape[0], _CHUNK_ELEMENTS // max(1, per_case)))
