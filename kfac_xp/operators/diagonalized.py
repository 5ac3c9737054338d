"""A symmetric matrix known by its eigenvectors and eigenvalues."""

from __future__ import annotations

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.linalg import symmetrized
from kfac_xp.operators.base import LinearOperator, Spectrum, norm_of
from kfac_xp.typing import Array, Scalar


class Diagonalized(LinearOperator):
    """``U diag(values) U.T`` for an orthogonal U in any form; any values will do.

    Parameters
    ----------
    vectors
        U. That it is orthogonal is not checked.
    values : shape [n]
        One for each column of U.
    """

    def __init__(self, vectors: LinearOperator, values: Array) -> None:
        self.vectors, self.values = vectors, values

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.values.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.values

    @property
    def T(self) -> Diagonalized:  # noqa: N802
        """The operator itself."""
        return self

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        xp = array_namespace(self.values)
        eye = xp.eye(self.domain_dimension, dtype=self.dtype, device=device_of(self.values))
        return symmetrized(self.matmul(eye))

    def trace(self) -> Array:
        """Sum of the eigenvalues, 0-d."""
        return array_namespace(self.values).sum(self.values)

    def diagonal(self) -> Array:
        """The diagonal, shape [n], from the squares of the entries of U."""
        return self.vectors.squared_entries().matmul(self.values)

    def spectrum(self) -> Spectrum:
        """What is stored."""
        return Spectrum(self.vectors, self.values)

    def power(self, exp: float) -> Diagonalized:
        """The same eigenvectors and ``values ** exp``."""
        return self.with_values(self.values**exp)

    def plus_identity(self, shift: Scalar) -> Diagonalized:
        """The same eigenvectors and ``values + shift``."""
        return self.with_values(self.values + shift)

    def scaled(self, factor: Scalar) -> Diagonalized:
        """The same eigenvectors and ``factor * values``."""
        return self.with_values(factor * self.values)

    def frobenius_norm(self) -> Array:
        """Norm of the eigenvalues, 0-d."""
        return norm_of(self.values)

    def with_values(self, values: Array) -> Diagonalized:
        """Other eigenvalues with the same eigenvectors."""
        return Diagonalized(self.vectors, values)

    def _left(self, x: Array) -> Array:
        return self.vectors._left(self.values[:, None] * self.vectors.T._left(x))

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self._left(xp.matrix_transpose(x)))
