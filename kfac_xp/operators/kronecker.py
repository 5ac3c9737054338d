"""Kronecker products, and matrices that are diagonal in a basis of Kronecker products."""

from __future__ import annotations

import numpy as np

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.linalg import kron
from kfac_xp.operators.base import CHUNK_ELEMENTS, LinearOperator, Spectrum
from kfac_xp.operators.diagonalized import Diagonalized
from kfac_xp.params import IndexedSlices
from kfac_xp.typing import Array, Scalar


class KroneckerProduct(LinearOperator):
    """``scale * kron(A, G)``, never formed.

    ``kron(A, G) @ V.ravel() == (A @ V @ G.T).ravel()`` for V of shape [d_in, d_out] raveled
    row-major: the basis of `layer_params_to_mat2d`.
    """

    def __init__(self, A: LinearOperator, G: LinearOperator, scale: Scalar = 1.0) -> None:
        self.A, self.G, self.scale = A, G, scale

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns: ``d_in * d_out``."""
        return self.A.domain_dimension * self.G.domain_dimension

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.A.like

    @property
    def T(self) -> KroneckerProduct:  # noqa: N802
        """``scale * kron(A.T, G.T)``."""
        return KroneckerProduct(self.A.T, self.G.T, self.scale)

    def apply(self, mat: Array) -> Array:
        """``scale * A @ V @ G.T`` for V of shape [d_in, d_out], or `IndexedSlices` of one."""
        product = self.G.matmul_right(self.A.matmul(mat), adjoint=True)
        if isinstance(self.scale, float) and self.scale == 1.0:
            return product
        if isinstance(product, IndexedSlices):
            return product.with_values(self.scale * product.values)
        return self.scale * product

    def to_dense(self) -> Array:
        """The matrix, shape [d_in * d_out, d_in * d_out]: large."""
        return self.scale * kron(self.A.to_dense(), self.G.to_dense())

    def trace(self) -> Array:
        """``scale * tr(A) * tr(G)``, 0-d."""
        return self.scale * self.A.trace() * self.G.trace()

    def diagonal(self) -> Array:
        """The diagonal, shape [d_in * d_out]."""
        xp = array_namespace(self.A.diagonal())
        outer = self.A.diagonal()[:, None] * self.G.diagonal()[None, :]
        return self.scale * xp.reshape(outer, (-1,))

    def entries_at(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """See `LinearOperator.entries_at`: products of entries of the sides."""
        xp, device, d_out = array_namespace(self.like), device_of(self.like), self.G.shape[0]
        product = self.scale
        for side, of in ((self.A, np.floor_divide), (self.G, np.remainder)):
            # Many parameters share a row: each entry of a side is made once.
            own, back = zip(
                *(np.unique(of(i, d_out), return_inverse=True) for i in (rows, columns)),
                strict=True,
            )
            found = side.entries_at(*own)
            for axis, order in enumerate(back):
                found = xp.take(found, xp.asarray(order, device=device), axis=axis)
            product = product * found
        return product

    def spectrum(self) -> Spectrum:
        """Products of the sides' eigenvectors, and of their eigenvalues."""
        a, g = self.A.spectrum(), self.G.spectrum()
        xp = array_namespace(a.values, g.values)
        values = self.scale * (a.values[:, None] * g.values[None, :])
        return Spectrum(KroneckerProduct(a.vectors, g.vectors), xp.reshape(values, (-1,)))

    def power(self, exp: float) -> KroneckerProduct:
        """The product of the sides' powers, which are positive semidefinite as the scale is."""
        return KroneckerProduct(self.A.power(exp), self.G.power(exp), self.scale**exp)

    def plus_identity(self, shift: Scalar) -> KroneckerEigen:
        """In the basis of the sides' eigenvectors: exact, and no Kronecker product any more."""
        spectrum = self.spectrum()
        assert isinstance(spectrum.vectors, KroneckerProduct)
        return KroneckerEigen(spectrum.vectors.A, spectrum.vectors.G, spectrum.values + shift)

    def scaled(self, factor: Scalar) -> KroneckerProduct:
        """Another scale."""
        return KroneckerProduct(self.A, self.G, factor * self.scale)

    def frobenius_norm(self) -> Array:
        """The product of the sides' norms, 0-d."""
        norm = self.A.frobenius_norm() * self.G.frobenius_norm() * self.scale
        return array_namespace(norm).abs(norm)

    def squared_entries(self) -> KroneckerProduct:
        """The product of the sides' squared entries."""
        squares = self.A.squared_entries(), self.G.squared_entries()
        return KroneckerProduct(*squares, self.scale * self.scale)

    def _left(self, x: Array) -> Array:
        xp, k = array_namespace(x), x.shape[1]
        d_in, d_out = self.A.domain_dimension, self.G.domain_dimension
        # Columns of x are matrices [d_in, d_out]: A acts on their rows, then G on their columns.
        rows = xp.reshape(self.A._left(xp.reshape(x, (d_in, d_out * k))), (d_in, d_out, k))
        columns = xp.reshape(xp.permute_dims(rows, (1, 0, 2)), (d_out, d_in * k))
        product = xp.reshape(self.G._left(columns), (d_out, d_in, k))
        return self.scale * xp.reshape(xp.permute_dims(product, (1, 0, 2)), (d_in * d_out, k))

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self.T._left(xp.matrix_transpose(x)))


class KroneckerEigen(Diagonalized):
    """``kron(U, V) diag(values) kron(U, V).T`` with orthogonal U and V, never formed.

    The sum of a Kronecker product and a multiple of the identity is of this form, and so is any
    other diagonal in the eigenbasis of a Kronecker product.

    Parameters
    ----------
    U, V : shape [d_in, d_in] and [d_out, d_out]
        Orthogonal; that is not checked.
    values : shape [d_in * d_out] or [d_in, d_out]
        Any numbers: one for each product of a column of U and a column of V.
    """

    def __init__(self, U: LinearOperator, V: LinearOperator, values: Array) -> None:
        flat = array_namespace(values).reshape(values, (-1,))
        super().__init__(KroneckerProduct(U, V), flat)
        self.U, self.V = U, V

    def with_values(self, values: Array) -> KroneckerEigen:
        """Other values in the same basis."""
        return KroneckerEigen(self.U, self.V, values)

    def entries_at(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """See `LinearOperator.entries_at`: from these rows of the eigenvectors.

        Or by products with unit vectors, where that is less work.
        """
        d_in, d_out = self.U.domain_dimension, self.V.domain_dimension
        if max(len(rows), len(columns)) > 2 * (d_in + d_out):
            return super().entries_at(rows, columns)
        xp = array_namespace(self.values)
        values = xp.reshape(self.values, (d_in, d_out))
        (u, v), (s, t) = (self._rows(i) for i in (rows, columns))
        width = max(1, CHUNK_ELEMENTS // max(1, (len(rows) + len(columns)) * d_out))
        total = xp.zeros((len(rows), len(columns)), dtype=self.dtype, device=device_of(self.values))
        for start in range(0, d_in, width):
            part = slice(start, min(start + width, d_in))
            size = (part.stop - start) * d_out
            left = (u[:, part, None] * values[None, part, :]) * v[:, None, :]
            right = s[:, part, None] * t[:, None, :]
            left, right = (xp.reshape(x, (x.shape[0], size)) for x in (left, right))
            total = total + xp.matmul(left, xp.matrix_transpose(right))
        return total

    def _rows(self, places: np.ndarray) -> tuple[Array, Array]:
        """For each place the row of U and the row of V that its eigenvectors' entries are of."""
        d_out, found = self.V.domain_dimension, []
        for side, own in ((self.U, places // d_out), (self.V, places % d_out)):
            xp = array_namespace(side.like)
            once, back = np.unique(own, return_inverse=True)
            rows = side.entries_at(once, np.arange(side.domain_dimension))
            found.append(xp.take(rows, xp.asarray(back, device=device_of(side.like)), axis=0))
        return found[0], found[1]

    def apply(self, mat: Array) -> Array:
        """The product with a matrix V of shape [d_in, d_out], or with `IndexedSlices` of one.

        Rows stay sparse if U is diagonal, as it is where the input factor is.
        """
        xp = array_namespace(self.values)
        values = xp.reshape(self.values, (self.U.domain_dimension, self.V.domain_dimension))
        turned = self.V.matmul_right(self.U.matmul(mat, adjoint=True))
        if isinstance(turned, IndexedSlices):
            rows = xp.take(values, turned.indices, axis=0)
            turned = turned.with_values(rows * turned.values)
        else:
            turned = values * turned
        return self.V.matmul_right(self.U.matmul(turned), adjoint=True)
