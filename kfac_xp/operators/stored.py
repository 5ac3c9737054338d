"""Matrices that are stored as they are: all entries, or the diagonal."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, cast, device_of
from kfac_xp.operators.base import (
    LinearOperator,
    Spectrum,
    norm_of,
    on_diagonal,
    without_rounding,
)
from kfac_xp.params import IndexedSlices, matmul_diag_sparse
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Scalar


class FullMatrix(LinearOperator):
    """A stored matrix of shape [n, n]."""

    def __init__(self, matrix: Array) -> None:
        self.matrix = matrix
        self._spectrum: Spectrum | None = None

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.matrix.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.matrix

    @property
    def T(self) -> FullMatrix:  # noqa: N802
        """The transpose: a view where the library has views."""
        return FullMatrix(array_namespace(self.matrix).matrix_transpose(self.matrix))

    def to_dense(self) -> Array:
        """The stored matrix."""
        return self.matrix

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return array_namespace(self.matrix).linalg.trace(self.matrix)

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        return array_namespace(self.matrix).linalg.diagonal(self.matrix)

    def entries_at(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """See `LinearOperator.entries_at`; they are stored."""
        xp, device = array_namespace(self.matrix), device_of(self.matrix)
        taken = xp.take(self.matrix, xp.asarray(rows, device=device), axis=0)
        return xp.take(taken, xp.asarray(columns, device=device), axis=1)

    def spectrum(self) -> Spectrum:
        """By ``eigh``; eigenvalues that are zero to rounding are zero."""
        if self._spectrum is None:
            values, vectors = linalg.psd_eigh(self.matrix, clip=None)
            self._spectrum = Spectrum(FullMatrix(vectors), without_rounding(values))
        return self._spectrum

    def power(self, exp: float) -> FullMatrix:
        """The power, stored: one product of matrices."""
        basis, values = self.spectrum().vectors, self.spectrum().values
        assert isinstance(basis, FullMatrix)
        with exact_products(self.matrix):
            result = FullMatrix(linalg.eigen_power(values, basis.matrix, exp, 0.0))
        result._spectrum = Spectrum(basis, values**exp)
        return result

    def plus_identity(self, shift: Scalar) -> FullMatrix:
        """The sum, stored; eigenvectors that are known stay."""
        result = FullMatrix(linalg.add_to_diagonal(self.matrix, shift))
        if self._spectrum is not None:
            result._spectrum = Spectrum(self._spectrum.vectors, self._spectrum.values + shift)
        return result

    def scaled(self, factor: Scalar) -> FullMatrix:
        """The multiple, stored; eigenvectors that are known stay."""
        result = FullMatrix(factor * self.matrix)
        if self._spectrum is not None:
            result._spectrum = Spectrum(self._spectrum.vectors, factor * self._spectrum.values)
        return result

    def frobenius_norm(self) -> Array:
        """Root of the sum of all squared entries, 0-d."""
        return norm_of(self.matrix)

    def largest_eigenvalue(self) -> Array:
        """The largest eigenvalue, 0-d: without eigenvectors, if they are not known."""
        if self._spectrum is not None:
            return super().largest_eigenvalue()
        xp = array_namespace(self.matrix)
        return xp.max(xp.linalg.eigvalsh(self.matrix))

    def astype(self, dtype: Any) -> FullMatrix:
        """The matrix in another dtype."""
        return FullMatrix(cast(self.matrix, dtype))

    def squared_entries(self) -> FullMatrix:
        """The matrix of all entries squared."""
        return FullMatrix(self.matrix * self.matrix)

    def _left(self, x: Array) -> Array:
        return array_namespace(self.matrix, x).matmul(self.matrix, x)

    def _right(self, x: Array) -> Array:
        return array_namespace(self.matrix, x).matmul(x, self.matrix)


class Diag(LinearOperator):
    """A diagonal matrix, stored as its diagonal of shape [n]."""

    def __init__(self, entries: Array) -> None:
        self.entries = entries

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.entries.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.entries

    @property
    def T(self) -> Diag:  # noqa: N802
        """The operator itself."""
        return self

    def to_dense(self) -> Array:
        """The matrix, mostly zeros."""
        xp = array_namespace(self.entries)
        n = self.domain_dimension
        on_diagonal = xp.eye(n, dtype=self.dtype, device=device_of(self.entries))
        return on_diagonal * self.entries

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return array_namespace(self.entries).sum(self.entries)

    def diagonal(self) -> Array:
        """The stored entries."""
        return self.entries

    def entries_at(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """See `LinearOperator.entries_at`; they are stored, or zero."""
        return on_diagonal(self.entries, rows, columns)

    def spectrum(self) -> Spectrum:
        """The unit vectors and the entries."""
        return Spectrum(Diag(array_namespace(self.entries).ones_like(self.entries)), self.entries)

    def power(self, exp: float) -> Diag:
        """``diag(entries ** exp)``."""
        return Diag(self.entries**exp)

    def plus_identity(self, shift: Scalar) -> Diag:
        """``diag(entries + shift)``."""
        return Diag(self.entries + shift)

    def scaled(self, factor: Scalar) -> Diag:
        """``diag(factor * entries)``."""
        return Diag(factor * self.entries)

    def frobenius_norm(self) -> Array:
        """Root of the sum of the squared entries, 0-d."""
        return norm_of(self.entries)

    def astype(self, dtype: Any) -> Diag:
        """The matrix in another dtype."""
        return Diag(cast(self.entries, dtype))

    def squared_entries(self) -> Diag:
        """``diag(entries ** 2)``."""
        return Diag(self.entries * self.entries)

    def _left_of_rows(self, x: IndexedSlices) -> IndexedSlices:
        return matmul_diag_sparse(self.entries, x)

    def _left(self, x: Array) -> Array:
        return self.entries[:, None] * x

    def _right(self, x: Array) -> Array:
        return x * self.entries


LinearOperatorFullMatrix = FullMatrix
LinearOperatorDiag = Diag
