"""The interface of all operators: products for every one, matrix functions for symmetric ones."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.descriptions import Described, facts_of_array
from kfac_xp.params import IndexedSlices
from kfac_xp.precision import exact_products
from kfac_xp.typing import Array, Scalar

CHUNK_ELEMENTS = 2**20
"""Entries of an array that are made at once on the way to entries of a matrix."""

ROUNDING = 10
"""Eigenvalues below so many machine epsilons of the largest are rounding, and count as zero."""


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Eigenvectors and eigenvalues of a symmetric matrix: ``M = U diag(w) U.T``.

    Parameters
    ----------
    vectors
        U, orthogonal, in a form that keeps the structure of M.
    values : shape [n]
        w, in the order of the columns of U.
    """

    vectors: LinearOperator
    values: Array


class LinearOperator(Described):
    """A square matrix, known by what it does.

    ``op @ x`` and ``x @ op`` multiply by arrays of the operator's library: a vector [n], or a
    matrix with n rows (columns). ``np.asarray(op)`` gives the dense matrix of a NumPy operator.

    The matrix functions (from `spectrum` on) are those of symmetric matrices. That is not checked,
    as in ``eigh``, and neither is the sign of eigenvalues: nothing here reads the device.
    `CurvatureMatrix` looks, and is what users are given.
    """

    # NumPy arrays then leave `x @ op` to `__rmatmul__`.
    __array_ufunc__ = None

    @property
    @abc.abstractmethod
    def domain_dimension(self) -> int:
        """Number of rows and columns."""

    @property
    @abc.abstractmethod
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""

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

    def entries_at(self, rows: np.ndarray, columns: np.ndarray) -> Array:
        """The entries where these rows and columns cross, shape [len(rows), len(columns)].

        Of positions on the host. Here by products with unit vectors, some at a time, of the rows
        or of the columns, whichever are fewer.
        """
        if len(rows) < len(columns):
            return array_namespace(self.like).matrix_transpose(self.T.entries_at(columns, rows))
        xp, n, device = array_namespace(self.like), self.domain_dimension, device_of(self.like)
        places, wanted = xp.arange(n, device=device), xp.asarray(rows, device=device)
        width, pieces = max(1, CHUNK_ELEMENTS // max(1, n)), []
        for start in range(0, len(columns), width):
            part = xp.asarray(columns[start : start + width], device=device)
            units = xp.astype(places[:, None] == part[None, :], self.dtype)
            pieces.append(xp.take(self._left(units), wanted, axis=0))
        if not pieces:
            return xp.zeros((len(rows), 0), dtype=self.dtype, device=device)
        return xp.concat(pieces, axis=1)

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.like.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (self.domain_dimension, self.domain_dimension)

    def matmul(self, x: Array, adjoint: bool = False) -> Array:
        """``M @ x``, or ``M.T @ x``; `IndexedSlices` only if M is diagonal."""
        op = self.T if adjoint else self
        if isinstance(x, IndexedSlices):
            return op._left_of_rows(x)
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
        return np.asarray(self.to_dense(), dtype=dtype)

    def _facts(self) -> dict[str, str]:
        return {"shape": str(list(self.shape)), **facts_of_array(self.like)}

    # ------------------------------------------------------------------ symmetric matrices

    def spectrum(self) -> Spectrum:
        """Eigenvectors and eigenvalues, computed once and kept.

        Raises
        ------
        NotImplementedError
            If they follow from nothing that is stored.
        """
        raise self._without("eigenvalues")

    def power(self, exp: float) -> LinearOperator:
        """``M ** exp``: NaN or infinite where an eigenvalue does not have that power."""
        raise self._without("powers")

    def plus_identity(self, shift: Scalar) -> LinearOperator:
        """``M + shift * I``."""
        raise self._without("sum with a multiple of the identity")

    def scaled(self, factor: Scalar) -> LinearOperator:
        """``factor * M``."""
        raise self._without("multiples")

    def frobenius_norm(self) -> Array:
        """Root of the sum of all squared entries, 0-d."""
        return norm_of(self.spectrum().values)

    def largest_eigenvalue(self) -> Array:
        """The largest eigenvalue, 0-d."""
        values = self.spectrum().values
        return array_namespace(values).max(values)

    def smallest_eigenvalue(self) -> Array:
        """The smallest eigenvalue, or a number of its sign, 0-d."""
        values = self.spectrum().values
        return array_namespace(values).min(values)

    def logdet(self) -> Array:
        """Logarithm of the determinant of a positive definite matrix, 0-d."""
        values = self.spectrum().values
        xp = array_namespace(values)
        return xp.sum(xp.log(values))

    def root(self, exp: float) -> LinearOperator:
        """A matrix R with ``R @ R.T = M ** (2 exp)``: ``M ** exp``, where there is one."""
        return self.power(exp)

    def squared_entries(self) -> LinearOperator:
        """The matrix of all entries squared."""
        raise self._without("squared entries")

    def astype(self, dtype: Any) -> LinearOperator:
        """The matrix in another dtype."""
        raise self._without("other dtypes")

    def parts(self) -> dict[str, LinearOperator]:
        """The blocks of a block diagonal matrix by name; of any other itself, without a name."""
        return {"": self}

    # ------------------------------------------------------------------ for subclasses

    def _left_of_rows(self, x: IndexedSlices) -> IndexedSlices:
        raise TypeError(
            f"a {type(self).__name__} mixes rows, so its product with `IndexedSlices` is "
            "not sparse. Pass `x.to_dense()`, or multiply from the right."
        )

    def _without(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no {what} in closed form.")

    def _require(self, name: str, x: Array, axis: int) -> None:
        n = self.domain_dimension
        if x.ndim not in (1, 2) or x.shape[axis] != n:
            wanted = f"[{n}] or [{n}, k]" if axis == 0 else f"[{n}] or [k, {n}]"
            raise ValueError(f"`{name}` must have shape {wanted}; got {tuple(x.shape)}.")


Operators: TypeAlias = dict[str, LinearOperator]


def on_diagonal(entries: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """What `LinearOperator.entries_at` is of a diagonal matrix."""
    xp, device = array_namespace(entries), device_of(entries)
    taken = xp.take(entries, xp.asarray(rows, device=device), axis=0)[:, None]
    crossings = xp.asarray(rows[:, None] == columns[None, :], device=device)
    return xp.where(crossings, taken, xp.zeros_like(taken))


def norm_of(x: Array) -> Array:
    """Root of the sum of squares, whose squares do not leave the range of the dtype."""
    xp = array_namespace(x)
    largest = xp.max(xp.abs(x))
    unit = xp.where(largest == 0, xp.ones_like(largest), largest)
    relative = x / unit
    return unit * xp.sqrt(xp.sum(relative * relative))


def without_rounding(values: Array) -> Array:
    """Eigenvalues, with those that are zero to rounding made zero."""
    xp = array_namespace(values)
    floor = xp.max(xp.abs(values)) * (ROUNDING * float(xp.finfo(values.dtype).eps))
    return xp.where(xp.abs(values) <= floor, xp.zeros_like(values), values)
