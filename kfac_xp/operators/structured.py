"""A block that is repeated along the diagonal, and a matrix plus one of rank one."""

from __future__ import annotations

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.operators.base import LinearOperator, norm_of
from kfac_xp.typing import Array, Scalar


class RepeatedBlock(LinearOperator):
    """``kron(I_J, M)``: one block J times along the diagonal, and perhaps a last entry."""

    def __init__(self, block: Array, times: int, corner: Array | None = None) -> None:
        self.block, self.times, self.corner = block, times, corner

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.times * self.block.shape[0] + (self.corner is not None)

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.block

    @property
    def T(self) -> RepeatedBlock:  # noqa: N802
        """The transpose."""
        transposed = array_namespace(self.block).matrix_transpose(self.block)
        return RepeatedBlock(transposed, self.times, self.corner)

    def to_dense(self) -> Array:
        """The matrix, mostly zeros."""
        n = self.domain_dimension
        xp = array_namespace(self.block)
        return self._left(xp.eye(n, dtype=self.dtype, device=device_of(self.block)))

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        total = self.times * array_namespace(self.block).linalg.trace(self.block)
        return total if self.corner is None else total + self.corner

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        xp = array_namespace(self.block)
        entries = xp.tile(xp.linalg.diagonal(self.block), (self.times,))
        if self.corner is None:
            return entries
        return xp.concat([entries, xp.reshape(self.corner, (1,))])

    def frobenius_norm(self) -> Array:
        """Root of the sum of all squared entries, 0-d."""
        xp = array_namespace(self.block)
        norm = self.times**0.5 * norm_of(self.block)
        return norm if self.corner is None else norm_of(xp.stack([norm, self.corner]))

    def _left(self, x: Array) -> Array:
        xp = array_namespace(self.block, x)
        c, k = self.block.shape[0], x.shape[1]
        blocks = xp.reshape(x[: self.times * c, :], (self.times, c, k))
        product = xp.reshape(xp.matmul(self.block, blocks), (self.times * c, k))
        if self.corner is None:
            return product
        return xp.concat([product, self.corner * x[self.times * c :, :]])

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self.T._left(xp.matrix_transpose(x)))


class RankOneUpdate(LinearOperator):
    """``M + coefficient * outer(vector, vector)``."""

    def __init__(self, base: LinearOperator, vector: Array, coefficient: Scalar) -> None:
        self.base, self.vector, self.coefficient = base, vector, coefficient

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.base.domain_dimension

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.vector

    @property
    def T(self) -> RankOneUpdate:  # noqa: N802
        """The transpose."""
        return RankOneUpdate(self.base.T, self.vector, self.coefficient)

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        outer = self.vector[:, None] * self.vector[None, :]
        return self.base.to_dense() + self.coefficient * outer

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        square = array_namespace(self.vector).sum(self.vector * self.vector)
        return self.base.trace() + self.coefficient * square

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        return self.base.diagonal() + self.coefficient * self.vector * self.vector

    def frobenius_norm(self) -> Array:
        """Root of the sum of all squared entries, 0-d."""
        xp, c = array_namespace(self.vector), self.coefficient
        size = xp.sum(self.vector * self.vector)
        mixed = xp.sum(self.vector * self.base.matmul(self.vector))
        base = self.base.frobenius_norm()
        return xp.sqrt(base * base + 2 * c * mixed + c * c * size * size)

    def _left(self, x: Array) -> Array:
        xp = array_namespace(self.vector, x)
        along = xp.matmul(self.vector[None, :], x)
        return self.base._left(x) + self.coefficient * self.vector[:, None] * along

    def _right(self, x: Array) -> Array:
        xp = array_namespace(self.vector, x)
        along = xp.matmul(x, self.vector[:, None])
        return self.base._right(x) + self.coefficient * along * self.vector[None, :]
