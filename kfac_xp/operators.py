"""Symmetric curvature matrices in the form in which they are stored, with a common interface."""

from __future__ import annotations

import abc
from typing import Any

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.linalg import kron
from kfac_xp.params import IndexedSlices, matmul_diag_sparse
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Scalar


class LinearOperator(abc.ABC):
    """A square matrix, known by what it does.

    ``op @ x`` and ``x @ op`` multiply by arrays of the operator's library: a vector [n], or a
    matrix with n rows (columns). ``np.asarray(op)`` gives the dense matrix of a NumPy operator.
    """

    # NumPy arrays then leave `x @ op` to `__rmatmul__`.
    __array_ufunc__ = None

    @property
    @abc.abstractmethod
    def domain_dimension(self) -> int:
        """Number of rows and columns."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Dtype of the entries."""

    @property
    @abc.abstractmethod
    def T(self) -> LinearOperator:  # noqa: N802  (the name that arrays have)
        """The transpose."""

    @abc.abstractmethod
    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""

    @abc.abstractmethod
    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""

    @abc.abstractmethod
    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""

    @abc.abstractmethod
    def _left(self, x: Array) -> Array:
        """``M @ x`` for x of shape [n, k]."""

    @abc.abstractmethod
    def _right(self, x: Array) -> Array:
        """``x @ M`` for x of shape [k, n]."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (self.domain_dimension, self.domain_dimension)

    def matmul(self, x: Array, adjoint: bool = False) -> Array:
        """``M @ x``, or ``M.T @ x``; `IndexedSlices` only if M is diagonal."""
        op = self.T if adjoint else self
        if isinstance(x, IndexedSlices):
            if not isinstance(op, Diag):
                raise TypeError(
                    f"a {type(self).__name__} mixes rows, so its product with `IndexedSlices` is "
                    "not sparse. Pass `x.to_dense()`, or multiply from the right."
                )
            return matmul_diag_sparse(op.entries, x)
        self._require("x", x, axis=0)
        with exact_products(x):
            return op._left(x[:, None])[:, 0] if x.ndim == 1 else op._left(x)

    def matmul_right(self, x: Array, adjoint: bool = False) -> Array:
        """``x @ M``, or ``x @ M.T``; of `IndexedSlices`, the stored rows times M."""
        op = self.T if adjoint else self
        if isinstance(x, IndexedSlices):
            return x.with_values(op.matmul_right(x.values))
        self._require("x", x, axis=-1)
        with exact_products(x):
            return op._right(x[None, :])[0, :] if x.ndim == 1 else op._right(x)

    def __matmul__(self, x: Array) -> Array:
        return self.matmul(x)

    def __rmatmul__(self, x: Array) -> Array:
        return self.matmul_right(x)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.asarray(self.to_dense(), dtype=dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"

    def _require(self, name: str, x: Array, axis: int) -> None:
        n = self.domain_dimension
        if x.ndim not in (1, 2) or x.shape[axis] != n:
            wanted = f"[{n}] or [{n}, k]" if axis == 0 else f"[{n}] or [k, {n}]"
            raise ValueError(f"`{name}` must have shape {wanted}; got {tuple(x.shape)}.")


class FullMatrix(LinearOperator):
    """A stored matrix of shape [n, n]."""

    def __init__(self, matrix: Array) -> None:
        self.matrix = matrix

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.matrix.shape[0]

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.matrix.dtype

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
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.entries.dtype

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

    def _left(self, x: Array) -> Array:
        return self.entries[:, None] * x

    def _right(self, x: Array) -> Array:
        return x * self.entries


class KroneckerProduct(LinearOperator):
    """``scale * kron(A, G)``, never formed.

    ``kron(A, G) @ V.ravel() == (A @ V @ G.T).ravel()`` for V of shape [d_in, d_out] raveled
    row-major: the basis of `layer_params_to_mat2d`.
    """

    def __init__(self, A: LinearOperator, G: LinearOperator, scale: float = 1.0) -> None:
        self.A, self.G, self.scale = A, G, scale

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns: ``d_in * d_out``."""
        return self.A.domain_dimension * self.G.domain_dimension

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.A.dtype

    @property
    def T(self) -> KroneckerProduct:  # noqa: N802
        """``scale * kron(A.T, G.T)``."""
        return KroneckerProduct(self.A.T, self.G.T, self.scale)

    def apply(self, mat: Array) -> Array:
        """``scale * A @ V @ G.T`` for V of shape [d_in, d_out], or `IndexedSlices` of one."""
        product = self.G.matmul_right(self.A.matmul(mat), adjoint=True)
        if self.scale == 1.0:
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

    def _left(self, x: Array) -> Array:
        xp = array_namespace(x)
        sizes = (self.A.domain_dimension, self.G.domain_dimension)
        columns = [xp.reshape(x[:, i], sizes) for i in range(x.shape[1])]
        return xp.stack([xp.reshape(self.apply(v), (-1,)) for v in columns], axis=1)

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self.T._left(xp.matrix_transpose(x)))


class RepeatedBlock(LinearOperator):
    """``kron(I_J, M)``: one block J times along the diagonal, and perhaps a last entry."""

    def __init__(self, block: Array, times: int, corner: Array | None = None) -> None:
        self.block, self.times, self.corner = block, times, corner

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self.times * self.block.shape[0] + (self.corner is not None)

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.block.dtype

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
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.base.dtype

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

    def _left(self, x: Array) -> Array:
        xp = array_namespace(self.vector, x)
        along = xp.matmul(self.vector[None, :], x)
        return self.base._left(x) + self.coefficient * self.vector[:, None] * along

    def _right(self, x: Array) -> Array:
        xp = array_namespace(self.vector, x)
        along = xp.matmul(x, self.vector[:, None])
        return self.base._right(x) + self.coefficient * along * self.vector[None, :]


LinearOperatorFullMatrix = FullMatrix
LinearOperatorDiag = Diag
