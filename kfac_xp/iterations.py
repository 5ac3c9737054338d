"""Inverses and eigenvectors that start from the last ones and are made of matrix products.

Pure functions of one matrix [n, n] or of a stack [k, n, n]. They always return; how good the
result is comes with it, on the device, and the caller looks.
"""

from __future__ import annotations

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.linalg import identity_like, quiet_failures, symmetrized
from kfac_xp.typing import Array

NEWTON_SCHULZ_STEPS = 4
"""Steps of `newton_schulz`: eight products. Fixed, so that nothing is read on the way."""


def newton_schulz(matrix: Array, start: Array) -> tuple[Array, Array]:
    """Improve an approximate inverse: ``X <- c X (2 I - c A X)``, a fixed number of times.

    The residual ``R = I - c A X`` of one step is squared by it, so the iteration converges, and
    then doubles the digits with each step, if all eigenvalues of ``c A X`` are between 0 and 2.
    The scalar ``c = tr(A X) / |A X|_F^2`` is the one for which R is smallest in the Frobenius
    norm: it takes up a common change of scale, such as a new damping or the growth of a young
    average, at once, and tends to 1.

    Four steps bring a residual of 0.65 in the Frobenius norm to 1e-3, and with many small errors,
    whose spectral norm is what counts, one of several times as much. Between two inverse updates
    of a moving average with decay 0.95, ten steps apart, it is below that unless the damping is
    small for batches of few cases; the check then fails.

    Parameters
    ----------
    matrix : shape [n, n] or [k, n, n]
        A, symmetric positive definite: damped.
    start : of the same shape
        The last inverse.

    Returns
    -------
    The inverse, symmetric, and the squared Frobenius norm of the last R, which bounds the norm of
    ``I - A X`` but for rounding: 0-d or of shape [k]. Not small, or NaN, on failure.

    References
    ----------
    Schulz (1933); Hotelling (1943); Bodewig (1959), Matrix Calculus; Higham (2008), Functions of
    Matrices, section 7.3 and problem 7.8; Pan and Schreiber (1991) for the scaling.
    """
    xp = array_namespace(matrix, start)
    identity, inverse = identity_like(matrix), start
    for _ in range(NEWTON_SCHULZ_STEPS):
        product = xp.matmul(matrix, inverse)
        size = xp.sum(product * product, axis=(-2, -1))
        scale = (xp.linalg.trace(product) / size)[..., None, None]
        residual = identity - scale * product
        inverse = scale * (inverse + xp.matmul(inverse, residual))
    return symmetrized(inverse), xp.sum(residual * residual, axis=(-2, -1))


def orthogonal_iteration(matrix: Array, basis: Array) -> tuple[Array, Array, Array]:
    """Turn the last eigenvectors towards those of `matrix`: ``V <- qr(C V)``, once.

    The columns of V are sorted first by their Rayleigh quotients, the largest one leading: the
    first j columns then turn towards the space of the j largest eigenvalues, by the ratio of
    neighbouring eigenvalues, for every j at once. Nearly equal eigenvalues turn slowly, but what
    is left between them is small.

    Parameters
    ----------
    matrix : shape [n, n] or [k, n, n]
        C, symmetric positive semidefinite.
    basis : of the same shape
        Orthonormal columns.

    Returns
    -------
    The Rayleigh quotients ``diag(V^T C V)``, about in descending order; V; and what V leaves off
    the diagonal, ``V^T C V - diag(V^T C V)``.

    References
    ----------
    Golub and Van Loan (2013), Matrix Computations, section 8.2.4; Vyas et al. (2024),
    arXiv:2409.11321 (SOAP), where it keeps the eigenvectors of Shampoo's factors.
    """
    xp = array_namespace(matrix, basis)
    image = xp.matmul(matrix, basis)
    order = xp.argsort(xp.sum(basis * image, axis=-2), axis=-1, descending=True)
    with quiet_failures(matrix):
        turned, _ = xp.linalg.qr(_columns(image, order))
    rotated = symmetrized(
        xp.matmul(xp.matrix_transpose(turned), xp.matmul(matrix, turned)),
    )
    quotients = xp.linalg.diagonal(rotated)
    return quotients, turned, rotated - quotients[..., None] * identity_like(rotated)


def _columns(x: Array, order: Array) -> Array:
    """The columns of each matrix of `x` in an order of its own."""
    xp, n = array_namespace(x, order), x.shape[-1]
    if x.ndim == 2:
        return xp.take(x, order, axis=1)
    rows = xp.reshape(xp.matrix_transpose(x), (-1, n))
    starts = xp.arange(x.shape[0], dtype=order.dtype, device=device_of(x)) * n
    rows = xp.take(rows, xp.reshape(order + starts[:, None], (-1,)), axis=0)
    return xp.matrix_transpose(xp.reshape(rows, tuple(x.shape)))
