"""A matrix whose rows and columns are in another order."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp import state
from kfac_xp.backend import array_namespace
from kfac_xp.operators.base import LinearOperator, Spectrum
from kfac_xp.operators.stored import Diag, FullMatrix
from kfac_xp.typing import Array, Scalar


def permuted(operator: LinearOperator, places: Array) -> LinearOperator:
    """The matrix in which entry i of `operator` is entry ``places[i]``: stored, if that is so.

    Parameters
    ----------
    operator
        A matrix [n, n].
    places : integers of shape [n]
        Each of ``0 ... n - 1`` once.
    """
    xp = array_namespace(operator.like, places)
    inverse = xp.argsort(places)
    if isinstance(operator, Diag):
        return Diag(xp.take(operator.entries, inverse, axis=0))
    if isinstance(operator, FullMatrix):
        return FullMatrix(_both(operator.matrix, inverse))
    return Permuted(operator, places, inverse)


class Permuted(LinearOperator):
    """``P.T @ M @ P`` for a permutation P, by way of M: see `permuted`."""

    def __init__(self, base: LinearOperator, places: Array, inverse: Array) -> None:
        self.base, self.places, self.inverse = base, places, inverse

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.base.domain_dimension

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.base.like

    @property
    def T(self) -> Permuted:  # noqa: N802
        """The transpose."""
        return self._with(self.base.T)

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        return _both(self.base.to_dense(), self.inverse)

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return self.base.trace()

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        return self._ordered(self.base.diagonal())

    def entries_at(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """See `LinearOperator.entries_at`: those of M, at other positions."""
        there = state.to_numpy(self.inverse)
        return self.base.entries_at(there[rows], there[columns])

    def spectrum(self) -> Spectrum:
        """That of M, in this order."""
        spectrum = self.base.spectrum()
        return Spectrum(self._with(spectrum.vectors), self._ordered(spectrum.values))

    def power(self, exp: float) -> Permuted:
        """That of M, in this order."""
        return self._with(self.base.power(exp))

    def root(self, exp: float) -> Permuted:
        """That of M, in this order."""
        return self._with(self.base.root(exp))

    def plus_identity(self, shift: Scalar) -> Permuted:
        """That of M, in this order."""
        return self._with(self.base.plus_identity(shift))

    def scaled(self, factor: Scalar) -> Permuted:
        """That of M, in this order."""
        return self._with(self.base.scaled(factor))

    def frobenius_norm(self) -> Array:
        """Root of the sum of all squared entries, 0-d."""
        return self.base.frobenius_norm()

    def largest_eigenvalue(self) -> Array:
        """The largest eigenvalue, 0-d."""
        return self.base.largest_eigenvalue()

    def smallest_eigenvalue(self) -> Array:
        """The smallest eigenvalue, or a number of its sign, 0-d."""
        return self.base.smallest_eigenvalue()

    def logdet(self) -> Array:
        """Logarithm of the determinant, 0-d."""
        return self.base.logdet()

    def squared_entries(self) -> Permuted:
        """That of M, in this order."""
        return self._with(self.base.squared_entries())

    def parts(self) -> dict[str, LinearOperator]:
        """Those of M."""
        return self.base.parts()

    def astype(self, dtype: Any) -> Permuted:
        """The matrix in another dtype."""
        return self._with(self.base.astype(dtype))

    def _with(self, base: LinearOperator) -> Permuted:
        return Permuted(base, self.places, self.inverse)

    def _ordered(self, x: Array) -> Array:
        return array_namespace(x).take(x, self.inverse, axis=0)

    def _left(self, x: Array) -> Array:
        xp = array_namespace(x)
        return self._ordered(self.base._left(xp.take(x, self.places, axis=0)))

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        product = self.base._right(xp.take(x, self.places, axis=1))
        return xp.take(product, self.inverse, axis=1)


def _both(matrix: Array, order: Array) -> Array:
    xp = array_namespace(matrix)
    return xp.take(xp.take(matrix, order, axis=0), order, axis=1)
