"""Inverses of symmetric positive definite matrices on the CPU, and how good they are.

By halves, nearly all of it in matrix products, down to a small matrix that one compiled call
inverts. Large matrices go to LAPACK's potrf and potri where SciPy is installed. Not all: SciPy's
BLAS has threads of its own, which fight for the cores with those that NumPy's last product left
spinning. On two cores that made the inverses of a training step, of up to 1001 rows, take 1.7 to
2.5 times as long; alone LAPACK is at best 1.2 times faster
(benchmarks/results/inverses-cpu-2026-11-21.md).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.cpu.lapack import lapack

# Rows of a matrix that one compiled call inverts the factor of: up to here as fast as LAPACK.
_LEAF = 64

# Up to here by halves: an inverse takes less time than a spinning thread waits for more to do.
_HALVED = 1024

# Rows of a panel of a product with a triangle or to a triangle. Zeros are multiplied within one
# panel only; matrix products get slower as panels get smaller.
_PANEL = 256


def cholesky_inverse(x: Any, damping: Any) -> Any:
    """See ``kfac_xp.linalg.cholesky_inverse``."""
    inverse = np.array(x, order="C")
    inverse.reshape(-1)[:: x.shape[0] + 1] += float(damping)
    if not _invert_lower_triangle(inverse):
        return np.full_like(inverse, np.nan)
    _mirror(inverse)
    return inverse


def inverse_checks(x: Any, inverse: Any, damping: Any) -> Any:
    """See ``kfac_xp.linalg.inverse_checks``."""
    kind = x.dtype.type
    return np.array(_checks(x, inverse, kind(damping), _probe(len(x), kind)), dtype=x.dtype)


@functools.lru_cache(maxsize=64)
def _probe(n: int, kind: Any) -> Any:
    index = np.arange(n, dtype=kind)
    return np.cos(index * index)


def _invert_lower_triangle(matrix: Any) -> bool:
    """Overwrite the lower triangle of a matrix by that of its inverse; False if that fails."""
    potrf, potri = (lapack(name, matrix.dtype.char) for name in ("potrf", "potri"))
    if matrix.shape[0] > _HALVED and potrf is not None and potri is not None:
        # LAPACK's columns are rows here: its upper triangle is the lower one of these arrays.
        _, failed = potrf(matrix.T, lower=False, overwrite_a=True, clean=False)
        if not failed:
            potri(matrix.T, lower=False, overwrite_c=True)
        return not failed
    if not invert_factor(matrix):
        return False
    _square(matrix)
    return True


# ---------------------------------------------------------------------------------------------
# By halves


def invert_factor(matrix: Any) -> bool:
    """Overwrite a matrix by W, the inverse of its Cholesky factor, with zeros above the diagonal.

    For a matrix ``[[A, .], [B, D]]`` the factor's lower left block is ``L = B W_A.T``, what is left
    of D is ``D - L L.T``, and the lower left block of W is ``-W_D L W_A``. False if the matrix is
    not positive definite.
    """
    n = matrix.shape[0]
    if n <= _LEAF:
        return _invert_factor_of_leaf(matrix)
    h = n // 2
    a, b, d = matrix[:h, :h], matrix[h:, :h], matrix[h:, h:]
    if not invert_factor(a):
        return False
    factor = np.empty_like(b)
    _lower_times(a, b.T, factor.T)
    for part in panels(n - h):
        d[part, : part.stop] -= factor[part] @ factor[: part.stop].T
    np.negative(factor, out=b)
    if not invert_factor(d):
        return False
    _lower_times(d, b, factor)
    _lower_transposed_times(a, factor.T, b.T)
    matrix[:h, h:] = 0
    return True


def _square(w: Any) -> None:
    """Overwrite a lower triangular matrix by ``W.T @ W``, of which only the lower triangle counts.

    For ``W = [[A, 0], [B, D]]`` its blocks are ``A.T A + B.T B``, ``D.T B`` and ``D.T D``.
    """
    n = w.shape[0]
    if n <= _LEAF:
        w[...] = w.T @ w
        return
    h = n // 2
    a, b, d = w[:h, :h], w[h:, :h], w[h:, h:]
    _square(a)
    for part in panels(h):
        a[part, : part.stop] += b[:, part].T @ b[:, : part.stop]
    product = np.empty_like(b)
    _lower_transposed_times(d, b, product)
    b[...] = product
    _square(d)


def _lower_times(lower: Any, x: Any, out: Any) -> None:
    """``out = L @ x`` for a lower triangular L."""
    for part in panels(lower.shape[0]):
        np.matmul(lower[part, : part.stop], x[: part.stop], out=out[part])


def _lower_transposed_times(lower: Any, x: Any, out: Any) -> None:
    """``out = L.T @ x`` for a lower triangular L."""
    for part in panels(lower.shape[0]):
        np.matmul(lower[part.start :, part].T, x[part.start :], out=out[part])


def panels(n: int, width: int = _PANEL) -> list[slice]:
    """Cuts n rows into panels of about equal size."""
    count = max(1, round(n / width))
    edges = [n * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


@compiled
def _invert_factor_of_leaf(a):
    """`invert_factor` of a small matrix [n, n]: writes every element; reads the lower triangle."""
    n = a.shape[0]
    for i in range(n):
        for j in range(i + 1):
            rest = a[i, j]
            for k in range(np.uintp(j)):
                rest -= a[i, np.uintp(k)] * a[j, np.uintp(k)]
            # The diagonal holds reciprocals.
            if j < i:
                a[i, j] = rest * a[j, j]
            elif rest > 0:
                a[i, i] = 1 / np.sqrt(rest)
            else:
                return False
    row = np.empty(n, a.dtype)
    for i in range(n):
        row[:] = 0
        for k in range(i):
            for j in range(np.uintp(k + 1)):
                row[np.uintp(j)] -= a[i, k] * a[np.uintp(k), np.uintp(j)]
        for j in range(i):
            a[i, j] = a[i, i] * row[j]
        for j in range(i + 1, n):
            a[i, j] = 0
    return True


# ---------------------------------------------------------------------------------------------
# Passes


@compiled
def _mirror(a):
    """Copy the lower triangle of `a` [n, n] into the upper one, by blocks that fit the cache."""
    n = a.shape[0]
    block = 32
    for row in range(0, n, block):
        for column in range(0, row + 1, block):
            for i in range(row, min(n, row + block)):
                for j in range(np.uintp(column), np.uintp(min(i, column + block))):
                    a[j, np.uintp(i)] = a[i, j]


@compiled
def _checks(x, inverse, damping, probe):
    """The residual and the condition number, reading each matrix [n, n] once; NaN spreads."""
    n = x.shape[0]
    zero = x.dtype.type(0)
    image = np.empty(n, x.dtype)
    norm_of_inverse = zero
    for i in range(n):
        total, size = zero, zero
        for j in range(np.uintp(n)):
            total += inverse[i, np.uintp(j)] * probe[np.uintp(j)]
            size += abs(inverse[i, np.uintp(j)])
        image[i] = total
        if not size <= norm_of_inverse:
            norm_of_inverse = size
            if norm_of_inverse != norm_of_inverse:
                return norm_of_inverse, norm_of_inverse
    residual, norm = zero, zero
    for i in range(n):
        total, size = damping * image[i] - probe[i], zero
        for j in range(np.uintp(n)):
            total += x[i, np.uintp(j)] * image[np.uintp(j)]
            size += abs(x[i, np.uintp(j)])
        norm = max(norm, size)
        if not abs(total) <= residual:
            residual = abs(total)
            if residual != residual:
                break
    return residual, (norm + damping) * norm_of_inverse
