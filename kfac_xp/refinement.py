"""Eigenvectors of a matrix that has changed a little: rotations from the last ones."""

from __future__ import annotations

from kfac_xp.backend import Condition, KernelOp, array_namespace, device_of, is_one_float
from kfac_xp.linalg import (
    cholesky,
    identity_like,
    inverse_lower,
    quiet_failures,
    symmetrized,
)
from kfac_xp.typing import Array, Scalar

NUM_PROBES = 8
"""Vectors that `relative_residual` is estimated with."""


@KernelOp
def refined_eigenvectors(matrix: Array, basis: Array, damping: Scalar) -> tuple[Array, Array]:
    """Turn the last eigenvectors to those of `matrix`, by rotations of all pairs at once.

    With ``S = V^T C V``, ``V (I + X)`` makes S diagonal to first order if X is antisymmetric and
    ``X[i, j] = S[i, j] / (S[j, j] - S[i, i])``. The columns of that are nearly orthonormal, and
    one Cholesky factor of their products makes them so up to rounding. What is left off the
    diagonal is quadratic in X.

    That quotient must not be taken where eigenvalues are closer than S knows them: there any basis
    is as good, and the angles of all pairs of a cluster add up. In units of the damped eigenvalues,
    with ``D = diag(S) + damping``, ``r = S[i, j] / sqrt(D[i] D[j])`` and ``g`` the gap in the same
    units, it is ::

        2 r / (g + sign(g) sqrt(g^2 + 4 r^2 + 4 (R[i] + R[j]) + f^2)),

    where ``R[i]`` is the sum of the squares of r over row i, and f stands for the rounding of S.
    Without the last two it is the tangent of the angle of Jacobi, exact for one pair. With them
    it is that wherever the gap is beyond what the two rows leave off the diagonal, and for nearer
    pairs tends to ``r / sqrt(R[i] + R[j])``: no row of X is longer than 1, whatever the cluster.

    Parameters
    ----------
    matrix : shape [n, n] or [k, n, n]
        C, symmetric positive semidefinite.
    basis : of the same shape
        V, with orthonormal columns, in any order.
    damping
        What eigenvalues are to be known relative to: a number, or of a stack an array [k].

    Returns
    -------
    The eigenvalues, right to second order in X, in the order of the basis; and the eigenvectors.

    References
    ----------
    Jacobi (1846); Davies and Modi (1986), Linear Algebra Appl. 77, for all pairs at once; Ogita
    and Aishima (2018), Japan J. Indust. Appl. Math. 35, for the same as an iterative refinement.
    """
    xp = array_namespace(matrix, basis)
    transposed = xp.matrix_transpose
    n, info = matrix.shape[-1], xp.finfo(matrix.dtype)
    rotated = symmetrized(xp.matmul(transposed(basis), xp.matmul(matrix, basis)))
    values = xp.linalg.diagonal(rotated)
    rest = rotated - values[..., None] * identity_like(rotated)
    damped = xp.where(values > 0, values, xp.zeros_like(values))
    damped = damped + (damping if isinstance(damping, (int, float)) else damping[..., None])
    noise = xp.max(damped, axis=-1, keepdims=True) * (8 * n**0.5 * float(info.eps))
    least = noise + float(info.smallest_normal)
    scales = xp.where(damped > least, damped, least) ** -0.5
    scale = scales[..., :, None] * scales[..., None, :]
    gap = values[..., None, :] - values[..., :, None]
    r, g, f = rest * scale, gap * scale, noise[..., None] * scale
    left = xp.sum(r * r, axis=-1)
    left = left[..., :, None] + left[..., None, :]
    width = 4 * r * r + 4 * left + f * f + float(info.eps) ** 2
    x = 2 * r / (xp.abs(g) + xp.sqrt(g * g + width))
    index = xp.arange(n, device=device_of(matrix))
    is_above = index[:, None] < index[None, :]
    x = xp.where((g > 0) | ((g == 0) & is_above), x, -x)
    gains = xp.sum(2 * rest * x - x * x * gap, axis=-2)
    quotients = values + gains / (1 + xp.sum(x * x, axis=-2))
    turned = basis + xp.matmul(basis, x)
    with quiet_failures(matrix):
        factor = cholesky(symmetrized(xp.matmul(transposed(turned), turned)))
        inverse = inverse_lower(factor)
    return quotients, xp.matmul(turned, transposed(inverse))


def relative_residual(matrix: Array, values: Array, vectors: Array, damping: Scalar) -> Array:
    """How far eigenvalues and eigenvectors are from being those of `matrix`, estimated: 0-d.

    With ``D = diag(values) + damping`` the root mean square over rows of
    ``D^-1/2 (V^T C V - diag(values)) D^-1/2``, the relative error of ``V D V^T``, and that of
    ``V^T V - I``. The two Frobenius norms are estimated, without a product of matrices, by 8
    vectors of signs, of which the mean squared image is the square of the norm: to some 10 %. Up
    to 8 rows by the unit vectors, to rounding.

    Parameters
    ----------
    matrix, vectors : shape [n, n]
    values : shape [n]
    damping
        Where D is below the rounding of the largest, it is that.
    """
    xp, n = array_namespace(matrix, vectors), matrix.shape[0]
    info = xp.finfo(matrix.dtype)
    damped = values + damping
    least = xp.max(xp.abs(damped)) * (n * float(info.eps)) + float(info.smallest_normal)
    scales = xp.where(damped > least, damped, least)[:, None] ** -0.5
    if n <= NUM_PROBES:
        probes, count = identity_like(matrix), 1
    else:
        probes, count = _signs(matrix), NUM_PROBES
    images = xp.matmul(vectors, xp.concat([scales * probes, probes], axis=1))
    width = probes.shape[1]
    first = xp.matmul(matrix, images[:, :width])
    images = xp.matmul(xp.matrix_transpose(vectors), xp.concat([first, images[:, width:]], axis=1))
    off = scales * images[:, :width] - scales * scales * values[:, None] * probes
    lost = images[:, width:] - probes
    size = 1 / (n * count)
    return xp.sqrt(xp.sum(off * off) * size) + xp.sqrt(xp.sum(lost * lost) * size)


def _signs(like: Array) -> Array:
    """The same signs in every call, without a pattern: shape [n, 8]."""
    xp = array_namespace(like)
    index = xp.arange(like.shape[0], dtype=like.dtype, device=device_of(like))[:, None]
    column = xp.arange(1, NUM_PROBES + 1, dtype=like.dtype, device=device_of(like))
    waves = xp.cos(index * index * xp.sqrt(column))
    return xp.where(waves > 0, xp.ones_like(waves), -xp.ones_like(waves))


# ---------------------------------------------------------------------------------------------
# Kernels

refined_eigenvectors.register(
    "numba",
    "kfac_xp.kernels.cpu.refined_eigenvectors:refined_eigenvectors",
    accepts=Condition(
        "one matrix and one basis that are both float32 or both float64",
        lambda matrix, basis, damping: matrix.ndim == 2 and is_one_float(matrix, basis),
    ),
)
