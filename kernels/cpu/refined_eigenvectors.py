"""Eigenvectors refined on the CPU: three matrix products, and three of which one triangle counts.

Between them are two passes over a triangle, and the inverse of a Cholesky factor by halves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.cholesky_inverse import invert_factor, panels
from kfac_xp.kernels.cpu.jit import compiled

# Rows of a panel of a product of which one triangle counts. From 256 rows on such a product takes
# 0.85 to 0.7 of the time of a whole one; with panels of 256, as for inverses, 1 to 0.7.
_PANEL = 128


def refined_eigenvectors(matrix: Any, basis: Any, damping: Any) -> tuple[Any, Any]:
    """See ``kfac_xp.refinement.refined_eigenvectors``."""
    n, kind = matrix.shape[0], matrix.dtype.type
    image = matrix @ basis
    rotated = _lower_triangle(basis, image, np.empty((n, n), kind))
    values = rotated.diagonal().copy()
    damped = np.maximum(values, 0) + kind(float(damping))
    info = np.finfo(kind)
    noise = np.max(damped, initial=0) * kind(8 * n**0.5 * info.eps)
    scales = np.maximum(np.maximum(damped, noise), info.tiny) ** kind(-0.5)
    quotients = _rotations(rotated, values, scales, noise, info.eps)
    turned = basis @ rotated
    turned += basis
    gram = _lower_triangle(turned, turned, image)
    vectors = np.empty_like(rotated)
    if not invert_factor(gram):
        vectors[...] = np.nan
        return quotients, vectors
    for part in panels(n, _PANEL):
        np.matmul(gram[part, : part.stop], turned.T[: part.stop], out=vectors.T[part])
    return quotients, vectors


def _lower_triangle(x: Any, y: Any, out: Any) -> Any:
    """The lower triangle of ``x.T @ y``; what is above it in `out` is anything."""
    for part in panels(x.shape[1], _PANEL):
        np.matmul(x[:, part].T, y[:, : part.stop], out=out[part, : part.stop])
    return out


@compiled
def _rotations(s, values, scales, noise, eps):
    """Overwrite `s` [n, n], of which the lower triangle is read, by X; returns the quotients.

    By blocks that fit the cache: each pair is written to both triangles.
    """
    n = s.shape[0]
    kind = s.dtype.type
    zero, one, two, four = kind(0), kind(1), kind(2), kind(4)
    least = kind(eps) * kind(eps)
    left = np.zeros(n, s.dtype)
    for i in range(n):
        total = zero
        for j in range(np.uintp(i)):
            r = s[i, np.uintp(j)] * scales[i] * scales[np.uintp(j)]
            total += r * r
            left[np.uintp(j)] += r * r
        left[i] += total
    gains, squares = np.zeros(n, s.dtype), np.zeros(n, s.dtype)
    block = 32
    for row in range(0, n, block):
        for column in range(0, row + 1, block):
            for i in range(row, min(n, row + block)):
                stop = np.uintp(min(i, column + block))
                gain, square = zero, zero
                for j in range(np.uintp(column), stop):
                    scale = scales[i] * scales[j]
                    gap = values[j] - values[i]
                    r, g, f = s[i, j] * scale, gap * scale, noise * scale
                    width = four * r * r + four * (left[i] + left[j]) + f * f + least
                    x = two * r / (abs(g) + np.sqrt(g * g + width))
                    x = x if g > zero else -x
                    twice, xx = two * s[i, j] * x, x * x
                    gains[j] += twice - xx * gap
                    squares[j] += xx
                    gain += xx * gap - twice
                    square += xx
                    s[i, j] = x
                gains[i] += gain
                squares[i] += square
                for j in range(np.uintp(column), stop):
                    s[j, i] = -s[i, j]
    for i in range(n):
        s[i, i] = zero
        gains[i] = values[i] + gains[i] / (one + squares[i])
    return gains
