"""Sums of squared outer products on the CPU.

The products themselves are NumPy's matrix products: BLAS is not to be beaten there. What is
compiled is what stands around them, the patches and the sum of squares, and all of it works on a
few cases at a time, which stay in the cache from one step to the next.

The compiled code is serial. Where the product of one case is so large that BLAS splits it among
threads, its last bits are BLAS's own, as in every matrix product of NumPy's; the registry takes
these kernels for smaller ones.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.cpu.patches import fill_patches

# Elements of scratch (patches and per-case gradients) for one tile of cases, which holds at least
# one. Measured with 2**14 to 2**20: flat from 2**18 on; below 2**16 small cases lose up to half
# their speed to the number of calls.
_TILE_ELEMENTS = 2**18


def squared_outer(rows: Any, grads: Any) -> Any:
    """See ``kfac_xp.ops.squared_outer``."""
    if rows.ndim == 2:
        rows, grads = rows[:, None, :], grads[:, None, :]
    rows, grads = np.ascontiguousarray(rows), np.ascontiguousarray(grads)
    out = np.zeros((rows.shape[-1], grads.shape[-1]), dtype=rows.dtype)
    case_grads = np.empty((_cases_in_tile(rows.shape[0], out.size), *out.shape), dtype=out.dtype)
    for start in range(0, rows.shape[0], max(1, case_grads.shape[0])):
        part = slice(start, start + case_grads.shape[0])
        _add_tile(rows[part], grads[part], case_grads, out)
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
    inputs, grads = np.ascontiguousarray(inputs), np.ascontiguousarray(outputs_grad)
    out_shape = geometry.output_shape(space)
    num_locations, c_out = math.prod(out_shape), grads.shape[-1]
    grads = grads.reshape(num_cases, num_locations, c_out)
    d = math.prod(geometry.kernel) * channels
    out = np.zeros((d + has_bias, c_out), dtype=inputs.dtype)
    tile = _cases_in_tile(num_cases, d * (num_locations + c_out))
    patches = np.empty((tile, num_locations, d), dtype=inputs.dtype)
    case_grads = np.empty((tile, d, c_out), dtype=inputs.dtype)
    for start in range(0, num_cases, max(1, tile)):
        part = inputs[start : start + tile]
        rows = patches[: part.shape[0]]
        fill_patches(part, geometry, rows.reshape(part.shape[0], *out_shape, d))
        if patch_mask is not None:
            rows *= patch_mask.reshape(d)
        _add_tile(rows, grads[start : start + tile], case_grads, out[:d])
    if has_bias:
        # Its patch entry is 1 at every location. (A product: NumPy sums a middle axis slowly.)
        _add_squares(np.matmul(np.ones((1, num_locations), dtype=out.dtype), grads), out[d:])
    return out


def _cases_in_tile(num_cases: int, elements_per_case: int) -> int:
    return min(num_cases, max(1, _TILE_ELEMENTS // max(1, elements_per_case)))


def _add_tile(rows: Any, grads: Any, scratch: Any, out: Any) -> None:
    """Add the squares of the case gradients of a few cases; these go through `scratch`."""
    case_grads = scratch[: rows.shape[0]]
    np.matmul(rows.transpose(0, 2, 1), grads, out=case_grads)
    _add_squares(case_grads, out)


@compiled
def _add_squares(case_grads, out):
    """``out += sum_n case_grads[n] ** 2``: one reading, and no array of squares.

    Every element of `out` [D, C] is added to once per case, in the order of the cases.
    """
    for n in range(case_grads.shape[0]):
        for d in range(out.shape[0]):
            for c in range(out.shape[1]):
                out[d, c] += case_grads[n, d, c] * case_grads[n, d, c]
