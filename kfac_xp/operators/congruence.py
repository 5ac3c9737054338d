"""Matrices ``F diag(s) F.T`` with a factor F that is not orthogonal, and inverses of such."""

from __future__ import annotations

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.linalg import symmetrized
from kfac_xp.operators.base import LinearOperator
from kfac_xp.typing import Array, Scalar

_INSTEAD = (
    "The inverse of a chain of uses has products, draws and what follows from them: `solve`, "
    "`inv()`, `sample()`; with option 1 the matrix itself, too, and `logdet`, `trace`, "
    "`diagonal`. Use FullyConnectedMultiIndepFB (approx='kron_indep') for the rest."
)


class Congruence(LinearOperator):
    """``F diag(values) F.T``: positive definite, and known by its products.

    Parameters
    ----------
    factor
        F, square and regular.
    values : shape [n]
        Positive.
    definite : 0-d
        Not positive if F or the values are not what they must be.
    inverse_factor
        The transpose of the inverse of F, if it is known; then the inverse is such a matrix, too.
    log_square
        Logarithm of the determinant of ``F @ F.T``, if it is known.
    """

    def __init__(
        self,
        factor: LinearOperator,
        values: Array,
        definite: Array,
        inverse_factor: LinearOperator | None = None,
        log_square: Array | None = None,
    ) -> None:
        self.factor, self.values, self.definite = factor, values, definite
        self.inverse_factor, self.log_square = inverse_factor, log_square

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.values.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.values

    @property
    def T(self) -> Congruence:  # noqa: N802
        """The operator itself."""
        return self

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        xp = array_namespace(self.values)
        eye = xp.eye(self.domain_dimension, dtype=self.dtype, device=device_of(self.values))
        return symmetrized(self.matmul(eye))

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return array_namespace(self.values).sum(self.diagonal())

    def diagonal(self) -> Array:
        """The diagonal, shape [n], from the squares of the entries of F."""
        return self.factor.squared_entries().matmul(self.values)

    def power(self, exp: float) -> LinearOperator:
        """Of powers only the matrix itself and its inverse."""
        if exp == 1.0:
            return self
        if exp != -1.0:
            raise self._without(f"power {exp:g}")
        if self.inverse_factor is None:
            return InverseOf(self)
        log_square = None if self.log_square is None else -self.log_square
        return Congruence(
            self.inverse_factor, 1 / self.values, self.definite, self.factor, log_square
        )

    def root(self, exp: float) -> LinearOperator:
        """``F diag(values ** 0.5)`` for power 1/2, that of the inverse for power -1/2."""
        if exp == 0.5:
            return ScaledColumns(self.factor, self.values**0.5)
        if exp == -0.5:
            return self.power(-1.0).root(0.5)
        raise self._without(f"draws of power {exp:g}")

    def scaled(self, factor: Scalar) -> Congruence:
        """Multiples of the values."""
        parts = (self.definite, self.inverse_factor, self.log_square)
        return Congruence(self.factor, factor * self.values, *parts)

    def logdet(self) -> Array:
        """Logarithm of the determinant, 0-d."""
        if self.log_square is None:
            raise self._without("determinant")
        xp = array_namespace(self.values)
        return xp.sum(xp.log(self.values)) + self.log_square

    def frobenius_norm(self) -> Array:
        """Raise NotImplementedError."""
        raise self._without("norm")

    def smallest_eigenvalue(self) -> Array:
        """A number of its sign, 0-d."""
        return self.definite

    def _left(self, x: Array) -> Array:
        return self.factor._left(self.values[:, None] * self.factor.T._left(x))

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self._left(xp.matrix_transpose(x)))

    def _without(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"this matrix has no {what} in closed form. {_INSTEAD}")


class InverseOf(LinearOperator):
    """A positive definite matrix of which the inverse is known, and nothing else."""

    def __init__(self, inverse: Congruence) -> None:
        self.inverse = inverse

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.inverse.domain_dimension

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.inverse.like

    @property
    def T(self) -> InverseOf:  # noqa: N802
        """The operator itself."""
        return self

    def to_dense(self) -> Array:
        """Raise NotImplementedError."""
        raise self._without("entries")

    def trace(self) -> Array:
        """Raise NotImplementedError."""
        raise self._without("trace")

    def diagonal(self) -> Array:
        """Raise NotImplementedError."""
        raise self._without("diagonal")

    def power(self, exp: float) -> LinearOperator:
        """Of powers only the inverse."""
        if exp != -1.0:
            raise self._without(f"power {exp:g}")
        return self.inverse

    def root(self, exp: float) -> LinearOperator:
        """That of the inverse for power -1/2."""
        if exp != -0.5:
            raise self._without(f"draws of power {exp:g}")
        return self.inverse.root(0.5)

    def scaled(self, factor: Scalar) -> InverseOf:
        """The inverse divided."""
        return InverseOf(self.inverse.scaled(1 / factor))

    def logdet(self) -> Array:
        """Raise NotImplementedError unless the inverse has it."""
        return -self.inverse.logdet()

    def frobenius_norm(self) -> Array:
        """Raise NotImplementedError."""
        raise self._without("norm")

    def smallest_eigenvalue(self) -> Array:
        """A number of its sign, 0-d."""
        return self.inverse.definite

    def _left(self, x: Array) -> Array:
        raise self._without("product")

    _right = _left

    def _without(self, what: str) -> NotImplementedError:
        return self.inverse._without(what)


class _Product(LinearOperator):
    """What products of operators share: no numbers but their products."""

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        xp, like = array_namespace(self.like), self.like
        return self.matmul(xp.eye(self.domain_dimension, dtype=like.dtype, device=device_of(like)))

    def trace(self) -> Array:
        """Sum of the diagonal of the dense matrix, 0-d."""
        return array_namespace(self.like).linalg.trace(self.to_dense())

    def diagonal(self) -> Array:
        """The diagonal of the dense matrix, shape [n]."""
        return array_namespace(self.like).linalg.diagonal(self.to_dense())

    def squared_entries(self) -> LinearOperator:
        """Raise NotImplementedError."""
        raise NotImplementedError(f"this matrix has no diagonal in closed form. {_INSTEAD}")

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self.T._left(xp.matrix_transpose(x)))


class ScaledColumns(_Product):
    """``F diag(scales)``, or its transpose."""

    def __init__(self, factor: LinearOperator, scales: Array, is_adjoint: bool = False) -> None:
        self.factor, self.scales, self.is_adjoint = factor, scales, is_adjoint

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.scales.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.scales

    @property
    def T(self) -> ScaledColumns:  # noqa: N802
        """The transpose."""
        return ScaledColumns(self.factor, self.scales, not self.is_adjoint)

    def _left(self, x: Array) -> Array:
        if self.is_adjoint:
            return self.scales[:, None] * self.factor.T._left(x)
        return self.factor._left(self.scales[:, None] * x)


class MinusProduct(_Product):
    """``(I - P.T) @ K``, or its transpose."""

    def __init__(
        self, projection: LinearOperator, basis: LinearOperator, is_adjoint: bool = False
    ) -> None:
        self.projection, self.basis, self.is_adjoint = projection, basis, is_adjoint

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.basis.domain_dimension

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.basis.like

    @property
    def T(self) -> MinusProduct:  # noqa: N802
        """The transpose."""
        return MinusProduct(self.projection, self.basis, not self.is_adjoint)

    def _left(self, x: Array) -> Array:
        if self.is_adjoint:
            return self.basis.T._left(x - self.projection._left(x))
        image = self.basis._left(x)
        return image - self.projection.T._left(image)
