"""Symmetric matrices as their lower triangles: what is worth keeping, or sending."""

from __future__ import annotations

import math

from kfac_xp.backend import (
    UNMEASURED,
    Condition,
    KernelOp,
    array_namespace,
    device_of,
    is_one_float,
    require_one_place,
)
from kfac_xp.ops.patches import CPU, CUDA
from kfac_xp.typing import Array


@KernelOp
def pack_symmetric(x: Array) -> Array:
    """The lower triangle of symmetric matrices, row by row, in half of the memory.

    ``packed[..., i * (i + 1) // 2 + j] = x[..., i, j]`` for ``j <= i``: the matrix
    ``[[a, b, c], [b, d, e], [c, e, f]]`` is packed to ``[a, b, d, c, e, f]``. What lies above the
    diagonal is not read.

    Parameters
    ----------
    x : shape [..., n, n]

    Returns
    -------
    Array of shape [..., n * (n + 1) // 2] and the dtype of `x`.

    Raises
    ------
    ValueError
        If the last two axes differ in length, or there is only one.
    """
    xp = array_namespace(x)
    *batch, n, _ = x.shape
    # The last row to begin at an entry or before it is the row of the entry.
    row_index = xp.arange(n, device=device_of(x))
    starts = row_index * (row_index + 1) // 2
    entry = xp.arange(n * (n + 1) // 2, device=device_of(x))
    row = xp.searchsorted(starts, entry, side="right") - 1
    index = row * n + entry - xp.take(starts, row) if n else entry
    return xp.take(xp.reshape(x, (*batch, n * n)), index, axis=-1)


@KernelOp
def unpack_symmetric(packed: Array, n: int | None = None) -> Array:
    """The symmetric matrices of which `pack_symmetric` kept the lower triangles.

    Parameters
    ----------
    packed : shape [..., n * (n + 1) // 2]
    n
        Rows of a matrix, to be checked: the length of the last axis tells it, too.

    Returns
    -------
    Array of shape [..., n, n] and the dtype of `packed`, exactly symmetric.

    Raises
    ------
    ValueError
        If the last axis is not as long as a triangle, or not as that of `n` rows.
    """
    xp = array_namespace(packed)
    *batch, size = packed.shape
    n = _rows_of(size)
    row = xp.arange(n, device=device_of(packed))[:, None]
    column = xp.reshape(row, (1, n))
    entry = row * (row + 1) // 2 + column
    mirrored = column * (column + 1) // 2 + row
    index = xp.reshape(xp.where(column <= row, entry, mirrored), (n * n,))
    return xp.reshape(xp.take(packed, index, axis=-1), (*batch, n, n))


def _rows_of(size: int) -> int:
    """Rows of the largest triangle that has at most so many entries."""
    return (math.isqrt(8 * size + 1) - 1) // 2


# ---------------------------------------------------------------------------------------------
# Checks


@pack_symmetric.checks
def _check_pack_symmetric(x: Array) -> None:
    require_one_place(x=x)
    if x.ndim < 2 or x.shape[-2] != x.shape[-1]:
        raise ValueError(
            f"`x` must be symmetric matrices, of shape [..., n, n]; got shape {tuple(x.shape)}."
        )


@unpack_symmetric.checks
def _check_unpack_symmetric(packed: Array, n: int | None = None) -> None:
    require_one_place(packed=packed)
    if packed.ndim == 0:
        raise ValueError(
            "`packed` must have the triangles of matrices along its last axis; got a 0-d array."
        )
    size = packed.shape[-1]
    found = _rows_of(size)
    if found * (found + 1) // 2 != size:
        raise ValueError(
            "`packed` must have a last axis of length n * (n + 1) / 2, as `pack_symmetric` makes "
            f"it: {found * (found + 1) // 2} for {found} rows, {(found + 1) * (found + 2) // 2} "
            f"for {found + 1}; got shape {tuple(packed.shape)}."
        )
    if n is not None and n != found:
        raise ValueError(
            f"`n` must be {found}, the rows of the matrix of which `packed` has {size} entries; "
            f"got {n}. Leave it out, or pass what was packed from {n} rows."
        )


# ---------------------------------------------------------------------------------------------
# Kernels. They move rows, where the references also make and read an index that is larger than
# what it leads to.

_FLOATS = Condition("float32 or float64", lambda x, n=None: is_one_float(x))
_WITH_HALVES = Condition(
    "float16, float32 or float64", lambda x, n=None: is_one_float(x, half=True)
)
for _op in (pack_symmetric, unpack_symmetric):
    _op.register("numba", f"{CPU}.triangles:{_op.name}", accepts=_FLOATS)
    _op.register("cuda", f"{CUDA}.triangles:{_op.name}", accepts=_WITH_HALVES, wins=UNMEASURED)
