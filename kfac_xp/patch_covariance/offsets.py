"""Correlations of images, one matrix product per offset."""

from __future__ import annotations

import itertools
import math

from kfac_xp.backend import (
    UNMEASURED,
    Condition,
    KernelOp,
    array_namespace,
    device_of,
    is_one_float,
    itemsize,
)
from kfac_xp.linalg import pad_with_zeros, symmetrized
from kfac_xp.patch_covariance.lattice import ranges
from kfac_xp.typing import Array


def offset_correlations(
    images: Array, offsets: tuple[tuple[int, ...], ...], scale: float, workspace: int
) -> Array:
    """``Q[d]`` for all offsets d: the correlation ``R[d]`` is ``Q[d] + Q[-d]^T``.

    With zeros behind each axis, positions of all cases are the rows of one matrix, and images at
    an offset the same rows further down: each product is one of two overlapping views. Half of
    the offsets are computed, ``Q[d]`` is zero for the others.

    Parameters
    ----------
    images : shape [N, *sizes, C]
    offsets
        For each axis, ascending and symmetric around 0.
    scale
        Multiplies the result.
    workspace
        Bytes for the padded cases that are held at a time; one is held in any case.

    Returns
    -------
    Array of shape [prod(len(offsets)), C, C], offsets in row-major order.
    """
    xp = array_namespace(images)
    num_cases, *sizes, channels = images.shape
    pads = [(0, max(d)) for d in offsets]
    widths = [n + after for n, (_, after) in zip(sizes, pads, strict=True)]
    every_offset = list(itertools.product(*offsets))
    steps = tuple(_rows_between(d, widths) for d in every_offset[len(every_offset) // 2 :])
    per_case = math.prod(widths)
    cases = max(1, workspace // max(1, itemsize(images) * per_case * channels))
    total = None
    for start, stop in ranges(num_cases, cases):
        padded = pad_with_zeros(images[start:stop, ...], pads)
        products = shifted_products(xp.reshape(padded, (-1, channels)), steps)
        total = products if total is None else total + products
    if total is None:  # no cases
        total = xp.zeros(
            (len(steps), channels, channels), dtype=images.dtype, device=device_of(images)
        )
    half = total * scale
    half = xp.concat([half[:1, ...] / 2, half[1:, ...]], axis=0)
    return xp.concat([xp.zeros_like(half[1:, ...]), half], axis=0)


@KernelOp
def shifted_products(rows: Array, steps: tuple[int, ...]) -> Array:
    """``out[i] = sum_m outer(rows[m], rows[m + steps[i]])``: rows times the same rows further down.

    Parameters
    ----------
    rows : shape [M, C]
        The last ``max(steps)`` of them are zero.
    steps
        Not negative.

    Returns
    -------
    Array of shape [len(steps), C, C].
    """
    return array_namespace(rows).stack([_product(rows, step) for step in steps])


@KernelOp
def second_moment(rows: Array) -> Array:
    """``rows.T @ rows`` for rows [N, d]: shape [d, d], symmetric."""
    return symmetrized(_product(rows, 0))


def _rows_between(offset: tuple[int, ...], widths: list[int]) -> int:
    step = 0
    for d, width in zip(offset, widths, strict=True):
        step = step * width + d
    return step


def _product(rows: Array, step: int) -> Array:
    """``rows[m].T @ rows[m + step]``, summed over m."""
    xp = array_namespace(rows)
    if step == 0:  # one buffer on both sides: NumPy then does half of the work
        return xp.matmul(xp.matrix_transpose(rows), rows)
    return xp.matmul(xp.matrix_transpose(rows[:-step, :]), rows[step:, :])


second_moment.register(
    "numba",
    "kfac_xp.kernels.cpu.second_moment:second_moment",
    accepts=Condition(
        "float32 or float64 with a multiple of 16 columns",
        lambda rows: is_one_float(rows) and rows.shape[1] % 16 == 0,
    ),
)
shifted_products.register(
    "cuda",
    "kfac_xp.kernels.cuda.shifted_products:shifted_products",
    accepts=Condition("float32 or float64", lambda rows, steps: is_one_float(rows)),
    wins=UNMEASURED,
)
