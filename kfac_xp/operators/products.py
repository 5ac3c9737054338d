"""Symmetric matrices that are known by their products alone."""

from __future__ import annotations

from collections.abc import Callable

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.linalg import symmetrized
from kfac_xp.operators.base import LinearOperator
from kfac_xp.typing import Array, Scalar

DENSE_LIMIT = 4096
"""Rows of the largest matrix that is made dense of one product for each row."""


class SymmetricProducts(LinearOperator):
    """A symmetric matrix given by a function that multiplies by it.

    Parameters
    ----------
    multiply
        ``M @ x`` for x of shape [n, k].
    like : shape [n]
        Library, device, dtype and n are read.
    name
        What it is, for error messages.
    instead
        What has the operations that this has not, for error messages.
    """

    def __init__(
        self, multiply: Callable[[Array], Array], like: Array, name: str, instead: str
    ) -> None:
        self.multiply, self.name, self.instead = multiply, name, instead
        self._like = like

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self._like.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self._like

    @property
    def T(self) -> SymmetricProducts:  # noqa: N802
        """The operator itself."""
        return self

    def to_dense(self) -> Array:
        """The matrix, by n products.

        Raises
        ------
        ValueError
            If it has more than `DENSE_LIMIT` rows.
        """
        n = self.domain_dimension
        if n > DENSE_LIMIT:
            raise ValueError(
                f"{self.name} is known by its products alone and has {n} rows; it is made dense up "
                f"to {DENSE_LIMIT}. {self.instead}"
            )
        xp = array_namespace(self._like)
        eye = xp.eye(n, dtype=self.dtype, device=device_of(self._like))
        return symmetrized(self.matmul(eye))

    def trace(self) -> Array:
        """Raise NotImplementedError: it takes n products."""
        raise self._without("trace")

    def diagonal(self) -> Array:
        """Raise NotImplementedError: it takes n products."""
        raise self._without("diagonal")

    def frobenius_norm(self) -> Array:
        """Raise NotImplementedError: it takes n products."""
        raise self._without("norm")

    def plus_identity(self, shift: Scalar) -> SymmetricProducts:
        """The sum, known by its products."""
        return self._with(lambda x: self.multiply(x) + shift * x)

    def scaled(self, factor: Scalar) -> SymmetricProducts:
        """The multiple, known by its products."""
        return self._with(lambda x: factor * self.multiply(x))

    def _with(self, multiply: Callable[[Array], Array]) -> SymmetricProducts:
        return SymmetricProducts(multiply, self._like, self.name, self.instead)

    def _left(self, x: Array) -> Array:
        return self.multiply(x)

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self.multiply(xp.matrix_transpose(x)))

    def _without(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self.name} is known by its products alone and has no {what}. {self.instead}"
        )
