"""A diagonal matrix plus one of low rank, and the roots from which it draws."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, as_scalar_like, cast, device_of
from kfac_xp.operators.base import LinearOperator, Spectrum, norm_of, on_diagonal
from kfac_xp.operators.stored import FullMatrix
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Scalar

DENSE_SIZE = 4096
"""The most rows of which eigenvalues and general powers are computed, by the dense matrix."""


class Whitened(NamedTuple):
    """``diag(roots) (I + Q diag(values) Q.T) diag(roots)`` with orthonormal columns Q."""

    roots: Array
    vectors: Array
    values: Array


class DiagonalPlusLowRank(LinearOperator):
    """``diag(entries) + scale * W @ W.T`` for W of few columns.

    Products, the inverse, the determinant, the diagonal, the trace, the norm and draws of powers
    1/2 and -1/2 are exact and take the order of ``n r**2``: nothing of shape [n, n] is made. The
    inverse has the same form (Woodbury), as have multiples and the sum with a multiple of the
    identity. Eigenvalues and all other powers follow from nothing smaller than the dense matrix,
    and are computed from that up to `DENSE_SIZE` rows.

    With ``entries = D`` the inverse goes by ``D**0.5 (I + Q diag(t) Q.T) D**0.5``: Q and t come of
    a QR decomposition of ``D**-0.5 W`` and of singular values [r, r]. (Of ``W.T D**-1 W`` every
    eigenvalue would be lost that is below the rounding of the largest, as many are where the
    damping is small.)

    Parameters
    ----------
    entries : shape [n]
        For inverses, draws and determinants positive; that is not checked.
    columns : shape [n, r]
        W, with r at most n.
    scale
        A number, or a 0-d array.
    """

    def __init__(self, entries: Array, columns: Array, scale: Scalar = 1.0) -> None:
        self.entries, self.columns, self.scale = entries, columns, scale
        self._whitened: Whitened | None = None
        self._dense: FullMatrix | None = None

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.entries.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.entries

    @property
    def T(self) -> DiagonalPlusLowRank:  # noqa: N802
        """The operator itself."""
        return self

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        xp = array_namespace(self.entries)
        with exact_products(self.entries):
            product = xp.matmul(self.columns, xp.matrix_transpose(self.columns))
        return linalg.symmetrized(self.scale * product) + self.entries * _eye(self.entries)

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return array_namespace(self.entries).sum(self.diagonal())

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        xp = array_namespace(self.entries)
        return self.entries + self.scale * xp.sum(self.columns * self.columns, axis=1)

    def entries_at(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """See `LinearOperator.entries_at`: of some rows of W."""
        xp, device = array_namespace(self.columns), device_of(self.columns)
        left, right = (
            xp.take(self.columns, xp.asarray(i, device=device), axis=0) for i in (rows, columns)
        )
        product = xp.matmul(left, xp.matrix_transpose(right))
        return on_diagonal(self.entries, rows, columns) + self.scale * product

    def spectrum(self) -> Spectrum:
        """That of the dense matrix.

        Raises
        ------
        NotImplementedError
            If there are more than `DENSE_SIZE` rows.
        """
        return self._as_dense("eigenvalues").spectrum()

    def power(self, exp: float) -> LinearOperator:
        """The inverse by Woodbury's formula; powers but 1 and -1 of the dense matrix.

        Raises
        ------
        NotImplementedError
            If that has more than `DENSE_SIZE` rows.
        """
        if exp == 1.0:
            return self
        if exp == -1.0:
            return self._inverse()
        return self._as_dense(f"power {exp:g}").power(exp)

    def root(self, exp: float) -> LinearOperator:
        """R with ``R @ R.T = M ** (2 exp)``: for 1/2 and -1/2 of this form, and not symmetric."""
        if exp not in (0.5, -0.5):
            return self.power(exp)
        roots, vectors, t = self.whitened()
        s = (1 + t) ** 0.5
        if exp == 0.5:
            return LowRankRoot(roots, vectors, t / (s + 1))
        return LowRankRoot(1 / roots, vectors, -t / (s * (s + 1)))

    def plus_identity(self, shift: Scalar) -> DiagonalPlusLowRank:
        """The shift is added to the entries."""
        shift = as_scalar_like(shift, self.entries)
        return DiagonalPlusLowRank(self.entries + shift, self.columns, self.scale)

    def scaled(self, factor: Scalar) -> DiagonalPlusLowRank:
        """Multiples of the entries and of the scale."""
        factor = as_scalar_like(factor, self.entries)
        return DiagonalPlusLowRank(factor * self.entries, self.columns, factor * self.scale)

    def frobenius_norm(self) -> Array:
        """Root of the sum of all squared entries, 0-d."""
        xp = array_namespace(self.entries)
        unit = norm_of(self.columns)
        columns = self.columns / xp.where(unit > 0, unit, xp.ones_like(unit))
        rows = xp.sum(columns * columns, axis=1)
        with exact_products(columns):
            gram = linalg.compute_cov(columns, normalizer=1)
        # Entries of W W^T off the diagonal: all of them, which are as many as those of the Gram
        # matrix's squares, but for the diagonal.
        off = xp.sum(gram * gram) - xp.sum(rows * rows)
        off = xp.where(off > 0, off, xp.zeros_like(off)) ** 0.5 * unit * unit
        scale = as_scalar_like(self.scale, off)
        return norm_of(xp.stack([norm_of(self.diagonal()), off * scale]))

    def logdet(self) -> Array:
        """Logarithm of the determinant of a positive definite matrix, 0-d."""
        xp, whitened = array_namespace(self.entries), self.whitened()
        return xp.sum(xp.log(self.entries)) + xp.sum(xp.log1p(whitened.values))

    def smallest_eigenvalue(self) -> Array:
        """Positive if the entries and the matrix are; else the smallest entry, which bounds it."""
        xp = array_namespace(self.entries)
        least = xp.min(self.entries)
        if isinstance(self.scale, float) and self.scale >= 0:
            return least
        inner = 1 + xp.min(self.whitened().values)
        return xp.where(least > 0, xp.where(inner < 1, inner * least, least), least)

    def astype(self, dtype: Any) -> DiagonalPlusLowRank:
        """The matrix in another dtype."""
        entries, columns = cast(self.entries, dtype), cast(self.columns, dtype)
        return DiagonalPlusLowRank(entries, columns, as_scalar_like(self.scale, entries))

    def whitened(self) -> Whitened:
        """The matrix in its other form, computed once and kept; its entries must be positive.

        A zero among them counts as the rounding of the largest of the diagonal.
        """
        if self._whitened is None:
            xp = array_namespace(self.entries)
            floor = xp.max(self.diagonal()) * float(xp.finfo(self.dtype).eps)
            with exact_products(self.entries), linalg.quiet_failures(self.entries):
                roots = xp.where(self.entries == 0, floor, self.entries) ** 0.5
                q, upper = xp.linalg.qr(self.columns / roots[:, None])
                turn, sizes, _ = linalg.svd(upper)
                self._whitened = Whitened(roots, xp.matmul(q, turn), self.scale * sizes * sizes)
        return self._whitened

    def _inverse(self) -> DiagonalPlusLowRank:
        roots, vectors, t = self.whitened()
        xp, inverted = array_namespace(t), -t / (1 + t)
        # Of one sign, the scale's, as they are: minus it after the inversion.
        columns = vectors * xp.abs(inverted) ** 0.5 / roots[:, None]
        if isinstance(self.scale, float):
            scale: Scalar = -math.copysign(1.0, self.scale)
        else:
            scale = -xp.sign(self.scale)
        result = DiagonalPlusLowRank(1 / self.entries, columns, scale)
        result._whitened = Whitened(1 / roots, vectors, inverted)
        return result

    def _as_dense(self, what: str) -> FullMatrix:
        n = self.domain_dimension
        if n > DENSE_SIZE:
            raise NotImplementedError(
                f"a diagonal plus a matrix of low rank has no {what} in closed form, and with {n} "
                f"parameters the dense matrix is too large to decompose (limit {DENSE_SIZE}). It "
                "has products, `solve`, `inv()`, `logdet`, `trace`, `diagonal`, `norm` and "
                "`sample(0.5)` or `sample(-0.5)`; other powers need approx='ekfac' or 'diagonal'."
            )
        if self._dense is None:
            self._dense = FullMatrix(self.to_dense())
        return self._dense

    def _left(self, x: Array) -> Array:
        xp = array_namespace(self.columns, x)
        along = xp.matmul(xp.matrix_transpose(self.columns), x)
        return self.entries[:, None] * x + self.scale * xp.matmul(self.columns, along)

    def _right(self, x: Array) -> Array:
        xp = array_namespace(self.columns, x)
        along = xp.matmul(x, self.columns)
        return x * self.entries + self.scale * xp.matmul(along, xp.matrix_transpose(self.columns))


class LowRankRoot(LinearOperator):
    """``diag(scales) (I + Q diag(values) Q.T)``, or its transpose.

    Parameters
    ----------
    scales : shape [n]
    vectors : shape [n, r]
        Q.
    values : shape [r]
    is_adjoint
        Whether the matrix is the transpose.
    """

    def __init__(
        self, scales: Array, vectors: Array, values: Array, is_adjoint: bool = False
    ) -> None:
        self.scales, self.vectors, self.values = scales, vectors, values
        self.is_adjoint = is_adjoint

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.scales.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.scales

    @property
    def T(self) -> LowRankRoot:  # noqa: N802
        """The transpose."""
        return LowRankRoot(self.scales, self.vectors, self.values, not self.is_adjoint)

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        return self.matmul(_eye(self.scales))

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return array_namespace(self.scales).sum(self.diagonal())

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        xp = array_namespace(self.scales)
        return self.scales * (1 + xp.sum(self.vectors * self.vectors * self.values, axis=1))

    def _left(self, x: Array) -> Array:
        if self.is_adjoint:
            return self._inner(self.scales[:, None] * x)
        return self.scales[:, None] * self._inner(x)

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self.T._left(xp.matrix_transpose(x)))

    def _inner(self, x: Array) -> Array:
        xp = array_namespace(self.vectors, x)
        along = self.values[:, None] * xp.matmul(xp.matrix_transpose(self.vectors), x)
        return x + xp.matmul(self.vectors, along)


def _eye(like: Array) -> Array:
    xp = array_namespace(like)
    return xp.eye(like.shape[0], dtype=like.dtype, device=device_of(like))
