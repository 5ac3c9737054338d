"""Curvature as a matrix: the one type that blocks, estimators and exact products give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kfac_xp import state
from kfac_xp.backend import array_namespace, as_scalar_like, cast, require_one_place
from kfac_xp.descriptions import Described, facts_of_array
from kfac_xp.operators.base import LinearOperator
from kfac_xp.operators.scipy_views import scipy_operator
from kfac_xp.operators.spaces import ModelSpace, VectorSpace, cast_back
from kfac_xp.params import IndexedSlices
from kfac_xp.precision import exact_products
from kfac_xp.randomness import Generator, generate_random_signs, normal
from kfac_xp.typing import Array, Scalar


class CurvatureMatrix(Described):
    """A symmetric matrix over parameters, in the form in which it is stored.

    ``M @ v`` and ``v @ M`` take

    - a vector in the shapes of the parameters: an array, a tuple (kernel, bias), or for a model
      ``{layer name: array or tuple}``;
    - a flat vector [n], or a batch of them, [n, k] (``x @ M``: [k, n]).

    Batches of vectors in the shapes of the parameters have a leading axis in each array and are
    announced: ``M.matmul(vectors, batched=True)``. Flat vectors hold the layers in order of
    registration, each array raveled row-major, as `vectors_to_flat` does. Results have the form
    and the dtype of the vector (of integers, the matrix's).

    Whatever needs eigenvalues (`solve`, `inv`, `matpower`, `logdet`, `eigvalsh`, `sample`) takes
    them from the smallest matrices that have them, the two factors of a Kronecker product, for
    example; they are computed when they are first wanted, and kept, as are powers. Eigenvalues
    within 10 machine epsilons of zero, relative to the largest, are taken to be zero. Whether
    eigenvalues are positive enough for the operation is looked at: on a device that is one read
    for each matrix, and the only one.

    Parameters
    ----------
    operator
        The matrix on flat vectors.
    space
        What vectors in the shapes of the parameters look like.
    """

    __array_ufunc__ = None  # NumPy arrays then leave `x @ M` and `c * M` to this class

    def __init__(self, operator: LinearOperator, space: VectorSpace) -> None:
        self.operator, self.space = operator, space
        self._powers: dict[float, CurvatureMatrix] = {}
        self._roots: dict[float, LinearOperator] = {}
        self._smallest: dict[str, float] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)`` with n the number of parameters."""
        return self.operator.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the entries."""
        return self.operator.dtype

    @property
    def T(self) -> CurvatureMatrix:  # noqa: N802  (the name that arrays have)
        """The matrix itself: it is symmetric."""
        return self

    # ------------------------------------------------------------------ products

    def matmul(self, x: Any, *, batched: bool = False) -> Any:
        """``M @ x``.

        Parameters
        ----------
        x
            A vector, or a flat batch [n, k], as described for the class.
        batched
            Whether `x` is a batch of vectors in the shapes of the parameters.

        Raises
        ------
        ValueError
            If the shapes are neither those of the parameters nor flat, or on another device.
        TypeError
            If arrays belong to another library than the matrix.
        """
        if not batched and self._is_flat(x, axis=0):
            self._require_place([x])
            return cast_back(self.operator.matmul(cast(x, self.dtype)), x)
        self._require(x, batched, "[n] or [n, k]")
        self._require_place(self.space.arrays(x))
        flat = self.space.flattened(x, batched, self.dtype)
        return self.space.shaped(self.operator.matmul_right(flat), like=x)

    def __matmul__(self, x: Any) -> Any:
        return self.matmul(x)

    def __rmatmul__(self, x: Any) -> Any:
        if self._is_flat(x, axis=-1):
            self._require_place([x])
            return cast_back(self.operator.matmul_right(cast(x, self.dtype)), x)
        self._require(x, False, "[n] or [k, n]")
        return self.matmul(x)

    def flatten(self, vector: Any, *, batched: bool = False) -> Array:
        """A vector in the shapes of the parameters as an array [n]; a batch as [k, n]."""
        self._require(vector, batched, None)
        return self.space.flattened(vector, batched)

    def unflatten(self, flat: Array) -> Any:
        """Inverse of `flatten`, of an array [n] or [k, n]."""
        n = self.shape[0]
        if flat.ndim not in (1, 2) or flat.shape[-1] != n:
            raise ValueError(f"`flat` must have shape [{n}] or [k, {n}]; got {tuple(flat.shape)}.")
        return self.space.shaped(flat)

    # ------------------------------------------------------------------ other matrices

    def matpower(self, exp: float) -> CurvatureMatrix:
        """``M ** exp``, of the same structure.

        Raises
        ------
        numpy.linalg.LinAlgError
            If `exp` is negative and the matrix not positive definite, or `exp` is no integer and
            it has negative eigenvalues.
        """
        exp = float(exp)
        if exp == 1.0:
            return self
        if exp not in self._powers:
            self._require_power(exp)
            self._powers[exp] = CurvatureMatrix(self.operator.power(exp), self.space)
        return self._powers[exp]

    def inv(self) -> CurvatureMatrix:
        """The inverse: ``matpower(-1)``, with its errors."""
        return self.matpower(-1.0)

    def solve(self, b: Any, *, batched: bool = False) -> Any:
        """``M^-1 @ b``, for whatever `matmul` takes; errors are those of `inv`."""
        return self.inv().matmul(b, batched=batched)

    def plus_identity(self, shift: Scalar) -> CurvatureMatrix:
        """``M + shift * I``, exactly: a Kronecker product becomes a matrix in its eigenbasis."""
        return CurvatureMatrix(
            self.operator.plus_identity(as_scalar_like(shift, self.operator.like)), self.space
        )

    def __mul__(self, factor: Scalar) -> CurvatureMatrix:
        if getattr(factor, "ndim", 0) != 0 or isinstance(factor, (str, CurvatureMatrix)):
            return NotImplemented
        factor = as_scalar_like(factor, self.operator.like)
        return CurvatureMatrix(self.operator.scaled(factor), self.space)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> CurvatureMatrix:
        return self * (1 / divisor)

    # ------------------------------------------------------------------ parts

    def layer(self, name: str) -> CurvatureMatrix:
        """The block of one layer, of the matrix of a model that is block diagonal.

        ``M.layer(name).inv()`` is the posterior covariance of a layer, and the same as
        ``M.inv().layer(name)``, without the inverses of all others.

        Raises
        ------
        KeyError
            If there is no such layer.
        TypeError
            If the matrix is that of a single layer.
        NotImplementedError
            If the matrix has entries between layers.
        """
        if not isinstance(self.space, ModelSpace):
            raise TypeError("the matrix is that of one layer already; `layer` parts a model's.")
        if name not in self.space.layers:
            raise KeyError(f"there is no layer {name!r}; there are {list(self.space.layers)}.")
        parts = self.operator.parts()
        if name not in parts:
            raise NotImplementedError(
                f"{type(self.operator).__name__} is not made of a block for each layer. Take the "
                "entries of a layer by `submatrix`."
            )
        return CurvatureMatrix(parts[name], self.space.layers[name])

    def submatrix(self, rows: Any, columns: Any = None) -> Array:
        """The entries where some rows and columns cross, dense: shape [r, c].

        ``M.inv().submatrix(places)`` is the posterior covariance of these parameters, all others
        integrated out. The whole matrix is not made: of a stored matrix and a Kronecker product
        entries are looked up and multiplied, in an eigenbasis summed over it; of what is known by
        its products alone they take one product for each row or column, whichever are fewer.

        Parameters
        ----------
        rows : integers of shape [r]
            Places in flat vectors, from 0, in any order: an array or a list.
            ``M.unflatten(xp.arange(n))`` has the place of each parameter, in the parameters'
            shapes. On a device reading them waits.
        columns : integers of shape [c]
            As `rows`, and the same if None.

        Raises
        ------
        ValueError
            If they are not one-dimensional, or a place is outside of the matrix.
        TypeError
            If they are not integers.
        NotImplementedError
            If the matrix has no products in closed form.
        """
        left = self._places("rows", rows)
        right = left if columns is None else self._places("columns", columns)
        with exact_products(self.operator.like):
            return self.operator.entries_at(left, right)

    # ------------------------------------------------------------------ numbers

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return self.operator.trace()

    def diagonal(self) -> Array:
        """The diagonal, shape [n]; ``M.unflatten(M.diagonal())`` has the shapes of parameters."""
        return self.operator.diagonal()

    def eigvalsh(self) -> Array:
        """The eigenvalues, ascending, shape [n]."""
        values = self.operator.spectrum().values
        return array_namespace(values).sort(values)

    def logdet(self) -> Array:
        """Logarithm of the determinant, 0-d.

        Raises
        ------
        numpy.linalg.LinAlgError
            If the matrix is not positive definite.
        """
        self._require_eigenvalues("logarithm of the determinant", positive=True)
        return self.operator.logdet()

    def norm(self, ord: str = "fro") -> Array:
        """The Frobenius norm, 0-d: root of the sum of all squared entries."""
        if ord != "fro":
            raise ValueError(
                f"`ord` must be 'fro'; got {ord!r}. Others follow from `eigvalsh()`: the spectral "
                "norm is the largest absolute value, the nuclear norm their sum."
            )
        return self.operator.frobenius_norm()

    def estimate_trace(self, num_probes: int, generator: Generator) -> Array:
        """Mean of ``z @ M @ z`` over random signs z: unbiased, 0-d. `trace` is exact where it is.

        References
        ----------
        Hutchinson (1990), Communications in Statistics 19(2).
        """
        if isinstance(num_probes, bool) or not isinstance(num_probes, int) or num_probes < 1:
            raise ValueError(f"`num_probes` must be a positive int; got {num_probes!r}.")
        z = generate_random_signs(generator, (num_probes, self.shape[0]), self.operator.like)
        return array_namespace(z).sum(z * self.operator.matmul_right(z)) / num_probes

    # ------------------------------------------------------------------ draws

    def sample(
        self, power: float = -0.5, *, generator: Generator, num_samples: int | None = None
    ) -> Any:
        """``M ** power @ z`` with z standard normal: a draw of covariance ``M ** (2 power)``.

        (A chain of uses, `FullyConnectedSeriesFB`, and a matrix of low rank plus a diagonal draw
        by another root of that covariance.)
        Power -1/2 draws from the normal law whose precision is M, power 1/2 from that whose
        covariance is M.

        Parameters
        ----------
        power
            Power of the matrix.
        generator
            A seed, NumPy generator, or device generator: see `kfac_xp.randomness`.
        num_samples
            None for one vector; a number k for a batch of k, with a leading axis in each array.

        Returns
        -------
        Vectors in the shapes of the parameters, in the dtype of the matrix.

        Raises
        ------
        numpy.linalg.LinAlgError
            As for `matpower`.
        """
        n = self.shape[0]
        shape = (n,) if num_samples is None else (num_samples, n)
        exp = float(power)
        if exp not in self._roots:
            self._require_power(exp)
            self._roots[exp] = self.operator.root(exp)
        z = normal(generator, shape, self.operator.like)
        return self.space.shaped(self._roots[exp].matmul_right(z, adjoint=True))

    # ------------------------------------------------------------------ other forms

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]: large."""
        return self.operator.to_dense()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.to_dense(), dtype=dtype)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` over flat vectors on the host.

        Raises
        ------
        ImportError
            If SciPy is not installed.
        """
        product = self.operator.matmul
        return scipy_operator(self.shape, product, product, self.operator.like, takes_columns=True)

    def _facts(self) -> dict[str, str]:
        form = type(self.operator).__name__
        return {"form": form, "shape": str(list(self.shape)), **facts_of_array(self.operator.like)}

    # ------------------------------------------------------------------ helpers

    def _places(self, name: str, places: Any) -> np.ndarray:
        """Places in flat vectors, on the host, checked."""
        found = state.to_numpy(places) if hasattr(places, "shape") else np.asarray(places)
        n = self.shape[0]
        if found.ndim != 1:
            raise ValueError(f"`{name}` must be one-dimensional; got shape {found.shape}.")
        if found.size and not np.issubdtype(found.dtype, np.integer):
            raise TypeError(
                f"`{name}` must be integers, places in flat vectors; got dtype {found.dtype}. Of a "
                "mask in the parameters' shapes they are `np.flatnonzero(M.flatten(mask))`."
            )
        if found.size and not (found.min() >= 0 and found.max() < n):
            raise ValueError(
                f"`{name}` must be places from 0 to {n - 1}; got from {found.min()} to "
                f"{found.max()}."
            )
        return found.astype(np.int64)

    def _is_flat(self, x: Any, axis: int) -> bool:
        """Whether `x` is a flat vector or batch, and not a vector in the parameters' shapes."""
        if isinstance(x, IndexedSlices):
            raise TypeError("`x` is `IndexedSlices`. Pass `x.to_dense()`.")
        if isinstance(x, (tuple, list)) or not hasattr(x, "ndim") or self.space.holds(x, False):
            return False
        return x.ndim in (1, 2) and x.shape[axis] == self.shape[0]

    def _require(self, x: Any, batched: bool, flat: str | None) -> None:
        if not self.space.holds(x, batched):
            n = self.shape[0]
            form = self.space.describe(batched)
            if flat is not None and not batched:
                form += f", or flat of shape {flat.replace('n', str(n))}"
            shape = getattr(x, "shape", None)
            found = type(x).__name__ if shape is None else f"shape {tuple(shape)}"
            raise ValueError(f"the vector must be {form}; got {found}.")

    def _require_place(self, arrays: Sequence[Array]) -> None:
        """Raise a TypeError for arrays of another library, a ValueError for another device."""
        named = {f"vector[{i}]": a for i, a in enumerate(arrays)}
        require_one_place(matrix=self.operator.like, **named)

    def _require_power(self, exp: float) -> None:
        """Raise a LinAlgError if the matrix does not have this power."""
        if exp < 0:
            self._require_eigenvalues(f"power {exp:g}", positive=True)
        elif not exp.is_integer():
            self._require_eigenvalues(f"power {exp:g}", positive=False)

    def _require_eigenvalues(self, what: str, *, positive: bool) -> None:
        """Raise a LinAlgError if an eigenvalue is negative, or is not positive."""
        for name, smallest in self._smallest_eigenvalues().items():
            if smallest > 0 or (smallest == 0 and not positive):
                continue
            wanted = "positive definite" if positive else "positive semidefinite"
            where = f"the block {name!r}" if name else "the matrix"
            raise np.linalg.LinAlgError(
                f"the {what} needs a {wanted} matrix; the smallest eigenvalue of {where} is "
                f"{smallest:.3g}. Use a positive damping, as in `matrix(damping=1e-3)`, or "
                "`plus_identity(shift)` with a shift above the size of that eigenvalue."
            )

    def _smallest_eigenvalues(self) -> dict[str, float]:
        """Of each part by name, in one read; NaN if they could not be computed."""
        if self._smallest is None:
            parts = self.operator.parts()
            found = [cast(part.smallest_eigenvalue(), self.dtype) for part in parts.values()]
            smallest = state.to_numpy(array_namespace(*found).stack(found))
            self._smallest = dict(zip(parts, smallest.tolist(), strict=True))
        return self._smallest
