"""Second moments and decompositions of symmetric matrices: pure functions of arrays."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, get_args

import array_api_compat
import numpy as np

from kfac_xp.backend import (
    Condition,
    KernelOp,
    array_namespace,
    device_of,
    is_one_float,
    library_of,
)
from kfac_xp.precision import exact_products, of_statistics
from kfac_xp.typing import Array, EigMethod, InverseMethod, Scalar


@of_statistics
def compute_cov(
    x: Array,
    y: Array | None = None,
    normalizer: float | None = None,
    *,
    symmetrize: bool = True,
) -> Array:
    """Second moment of rows, not centred: ``x.T @ x / normalizer``, exactly symmetric.

    Parameters
    ----------
    x : shape [N, d]
    y : shape [N, e], optional
        With it the result is ``x.T @ y / normalizer``, shape [d, e], not symmetrised.
    normalizer
        What the sum over rows is divided by; N if not given.
    symmetrize
        Mend the asymmetry that the rounding of a general matrix product leaves, in a pass over the
        result. False leaves that to a moving average, which takes the symmetric part on its way.
    """
    xp = array_namespace(x)
    n = x.shape[0] if normalizer is None else normalizer
    scale_rows = y is None and 0 < x.shape[0] < x.shape[1]  # the smaller array is divided
    if scale_rows:
        x, n = x * float(n) ** -0.5, 1
    elif y is None and type(x) is np.ndarray and x.itemsize not in x.strides:
        x = np.ascontiguousarray(x)  # BLAS would get two copies, which are not one buffer
    # Both operands are the same buffer, so that NumPy's matmul takes the symmetric rank-k update:
    # half the work of a general product.
    cov = xp.matmul(xp.matrix_transpose(x), x if y is None else y)
    if not scale_rows:
        cov /= n  # an array of this function's own
    if y is not None or not symmetrize or products_are_symmetric(x):
        return cov
    return symmetrized(cov)


def products_are_symmetric(x: Array) -> bool:
    """True if ``x.T @ x`` is exactly symmetric in the library of `x`.

    NumPy's is: its symmetric rank-k update writes one triangle and copies it.
    """
    return array_api_compat.is_numpy_array(x)


def symmetrized(x: Array) -> Array:
    """``(x + x.T) / 2``: removes the asymmetry that a general matrix product's rounding leaves."""
    return (x + array_namespace(x).matrix_transpose(x)) / 2


def append_homog(x: Array, homog_value: float = 1.0) -> Array:
    """Append one entry to the last axis: the homogeneous coordinate that stands for a bias."""
    xp = array_namespace(x)
    ones = xp.full((*x.shape[:-1], 1), homog_value, dtype=x.dtype, device=device_of(x))
    return xp.concat([x, ones], axis=-1)


def pad_with_zeros(images: Array, pads: Sequence[tuple[int, int]]) -> Array:
    """Zeros (before, after) each axis that follows the first; `images` itself if there are none."""
    if not any(map(any, pads)):
        return images
    xp = array_namespace(images)
    if array_api_compat.is_numpy_array(images):  # one pass, in place of one per axis
        inner = tuple(slice(b, b + n) for (b, _), n in zip(pads, images.shape[1:], strict=False))
        shape = list(images.shape)
        for axis, (before, after) in enumerate(pads, start=1):
            shape[axis] += before + after
        padded = np.zeros(shape, dtype=images.dtype)
        padded[(slice(None), *inner)] = images
        return padded
    for axis, widths in enumerate(pads, start=1):
        if any(widths):
            zeros_before, zeros_after = (
                xp.zeros(
                    (*images.shape[:axis], width, *images.shape[axis + 1 :]),
                    dtype=images.dtype,
                    device=device_of(images),
                )
                for width in widths
            )
            images = xp.concat([zeros_before, images, zeros_after], axis=axis)
    return images


def bordered(x: Array, last: Array) -> Array:
    """The matrix [d, d] with a row and a column appended, both `last` [d + 1]."""
    xp = array_namespace(x, last)
    wider = xp.concat([x, last[:-1, None]], axis=1)
    return xp.concat([wider, last[None, :]], axis=0)


def bincount(ids: Array, num_bins: int, like: Array) -> Array:
    """How often each of ``0 ... num_bins - 1`` occurs among integers [N]: shape [num_bins].

    Of the dtype of `like`. Made by sorting, without an array of N times `num_bins`; NaN if an
    integer is out of range.
    """
    xp = array_namespace(ids, like)
    edges = xp.arange(num_bins + 1, device=device_of(ids))
    below = xp.searchsorted(xp.sort(xp.astype(ids, edges.dtype)), edges)
    counts = xp.astype(below[1:] - below[:-1], like.dtype)
    all_counted = (below[0] == 0) & (below[-1] == ids.shape[0])
    return xp.where(all_counted, counts, xp.full_like(counts, xp.nan))


def add_rows(rows: Array, indices: Array, num_rows: int) -> Array:
    """Matrix [num_rows, d] of the sums of the `rows` [k, d] with each index [k], zero elsewhere."""
    xp = array_namespace(rows, indices)
    total = xp.zeros((num_rows, rows.shape[1]), dtype=rows.dtype, device=device_of(rows))
    if array_api_compat.is_jax_array(rows):
        return total.at[indices].add(rows)
    if array_api_compat.is_torch_array(rows):
        return total.index_add(0, indices, rows)
    if array_api_compat.is_numpy_array(rows):
        np.add.at(total, indices, rows)
        return total
    if array_api_compat.is_cupy_array(rows):
        importlib.import_module("cupy").add.at(total, indices, rows)
        return total
    bins = xp.arange(num_rows, dtype=indices.dtype, device=device_of(rows))
    return xp.matmul(xp.astype(bins[:, None] == indices[None, :], rows.dtype), rows)


def add_at(x: Array, index: tuple[slice | int, ...], y: Array) -> Array:
    """`x` with `y` added at an index. In place where the library can: `x` is given away."""
    if array_api_compat.is_jax_array(x):
        return x.at[index].add(y)
    x[index] += y
    return x


def kron(a: Array, b: Array) -> Array:
    """Kronecker product of two matrices."""
    xp = array_namespace(a, b)
    (m, n), (p, q) = a.shape, b.shape
    return xp.reshape(a[:, None, :, None] * b[None, :, None, :], (m * p, n * q))


kronecker_product = kron


def identity_like(x: Array) -> Array:
    """Identity of the size, dtype and device of the square matrix `x`, or of those stacked."""
    return array_namespace(x).eye(x.shape[-1], dtype=x.dtype, device=device_of(x))


def add_to_diagonal(x: Array, damping: Scalar) -> Array:
    """``x + damping * I``."""
    return x + damping * identity_like(x)


def quiet_failures(x: Array) -> AbstractContextManager[object]:
    """Context in which a failed decomposition is neither waited for nor warned about.

    CuPy would wait for the device to see whether a solver failed; NumPy would warn of the
    infinities and NaN that stand for the failure here, and at which callers look.
    """
    if array_api_compat.is_cupy_array(x):
        return importlib.import_module("cupyx").errstate(linalg="ignore")
    return np.errstate(divide="ignore", invalid="ignore", over="ignore")


def psd_eigh(x: Array, clip: float | None = 0.0) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, or of each of a stack.

    Eigenvalues below `clip` become `clip`: those of a second moment are not negative, and where
    rounding makes them so, a fractional power would be NaN. None leaves them as they are.
    Both results are NaN where the decomposition does not converge.
    """
    w, v = _each(_eigh, x, lambda failed: (failed[..., 0], failed))
    return clipped_below(w, clip), v


def clipped_below(w: Array, floor: Scalar | None) -> Array:
    """`w` with what is below `floor` replaced by it; NaN stays."""
    # A maximum against a Python scalar is not in the oldest standard that is served here.
    xp = array_namespace(w)
    return w if floor is None else xp.where(w < floor, xp.zeros_like(w) + floor, w)


def _each(
    decompose: Callable[[Array], Any], x: Array, failed: Callable[[Array], Any] = lambda x: x
) -> Any:
    """``decompose(x)`` of a matrix or a stack; `failed` of NaN where the library refuses.

    A library that refuses a stack because of one matrix is given them one by one.
    """
    xp = array_namespace(x)
    try:
        with quiet_failures(x):
            return decompose(x)
    except Exception as error:
        if not _is_linalg_error(error):
            raise
    if x.ndim == 2:
        return failed(xp.full(tuple(x.shape), xp.nan, dtype=x.dtype, device=device_of(x)))
    results = [_each(decompose, x[i, ...], failed) for i in range(x.shape[0])]
    if isinstance(results[0], tuple):
        return tuple(xp.stack(parts) for parts in zip(*results, strict=True))
    return xp.stack(results)


def _eigh(x: Array) -> tuple[Array, Array]:
    """The library's divide and conquer; for float32 in NumPy SciPy's, if there is one.

    Both are LAPACK's syevd, but from 128 rows on NumPy's takes 1.3 to 2 times as long in float32.
    """
    if array_api_compat.is_numpy_array(x) and x.dtype == np.float32:
        syevd = importlib.import_module("kfac_xp.kernels.cpu.lapack").lapack("syevd", "f")
        if syevd is not None:
            w, v, failed = syevd(x.T, lower=False)  # its columns are rows here
            if failed:
                raise np.linalg.LinAlgError
            return w, v
    return array_namespace(x).linalg.eigh(x)


def svd(x: Array) -> tuple[Array, Array, Array]:
    """``(U, singular values, V^T)`` of a square matrix; NaN where it does not converge."""
    u, s, vh = _each(array_namespace(x).linalg.svd, x, lambda failed: (failed, failed[0], failed))
    return u, s, vh


def eigen_power(w: Array, v: Array, exp: float, damping: Scalar) -> Array:
    """``V diag((w + damping) ** exp) V.T``, symmetric."""
    xp = array_namespace(w, v)
    return symmetrized(xp.matmul(v * (w + damping) ** exp, xp.matrix_transpose(v)))


def cholesky(x: Array, damping: Scalar = 0.0) -> Array:
    """Lower Cholesky factor of ``x + damping * I``; NaN if that is not positive definite.

    Libraries report the failure differently (an exception, NaN, nothing); here it is NaN
    everywhere, or may be garbage in CuPy, which waits for the device when asked to check. Callers
    look at a residual.
    """
    return _cholesky(add_to_diagonal(x, damping))


def _cholesky(damped: Array) -> Array:
    if array_api_compat.is_torch_array(damped):
        import torch

        factor, info = torch.linalg.cholesky_ex(damped)
        return torch.where(info[..., None, None] == 0, factor, torch.nan)
    xp = array_namespace(damped)
    factor = _each(xp.linalg.cholesky, damped)
    if not array_api_compat.is_cupy_array(damped):
        return factor
    # What the solver left behind at a pivot that is not positive would pass for a factor of zero.
    is_definite = xp.all(xp.linalg.diagonal(factor) > 0, axis=-1)
    return xp.where(is_definite[..., None, None], factor, xp.nan)


def inverse_lower(factor: Array) -> Array:
    """Inverse of a lower triangular matrix, by the library's triangular solver if it has one."""
    identity = identity_like(factor)
    if array_api_compat.is_torch_array(factor):
        import torch

        return torch.linalg.solve_triangular(factor, identity, upper=False)
    solve = _triangular_solver(library_of(factor))
    if solve is not None:
        identity = array_namespace(factor).broadcast_to(identity, tuple(factor.shape))
        return solve(factor, identity, lower=True)
    return _each(_inverse_lower_by_halves, factor)


def _inverse_lower_by_halves(factor: Array) -> Array:
    """``[[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]``: matrix products, mostly."""
    xp, n = array_namespace(factor), factor.shape[-1]
    if n <= 64:
        return xp.linalg.inv(factor)
    h = n // 2
    first = _inverse_lower_by_halves(factor[..., :h, :h])
    last = _inverse_lower_by_halves(factor[..., h:, h:])
    corner = -xp.matmul(last, xp.matmul(factor[..., h:, :h], first))
    zeros = xp.zeros((*factor.shape[:-2], h, n - h), dtype=factor.dtype, device=device_of(factor))
    upper, lower = xp.concat([first, zeros], axis=-1), xp.concat([corner, last], axis=-1)
    return xp.concat([upper, lower], axis=-2)


@KernelOp
def cholesky_inverse(x: Array, damping: Scalar) -> Array:
    """Inverse of ``x + damping * I`` by way of its Cholesky factor; not finite if there is none.

    Of `x`, shape [n, n] and symmetric, the lower triangle may be all that is read.
    """
    return inverse_of_damped(add_to_diagonal(x, damping))


def inverse_of_damped(damped: Array) -> Array:
    """Inverses, by Cholesky factors, of a matrix [n, n] or of each of a stack [k, n, n].

    Not finite where a matrix is not positive definite: in that member of a stack alone.
    """
    inverse_factor = inverse_lower(_cholesky(damped))
    xp = array_namespace(inverse_factor)
    return symmetrized(xp.matmul(xp.matrix_transpose(inverse_factor), inverse_factor))


def psd_inv(x: Array, damping: Scalar, method: InverseMethod = "cholesky") -> Array:
    """Inverse of ``x + damping * I`` for a symmetric positive semidefinite `x`.

    ``"cholesky"`` inverts the Cholesky factor, ``"matrix_inverse"`` calls the library's general
    inverse, ``"eig"`` uses an eigendecomposition without clipping. ``"newton_schulz"`` improves a
    last inverse; there is none here, so that it is ``"cholesky"``. Not finite on failure.

    Raises
    ------
    ValueError
        If `method` is none of these.
    """
    xp = array_namespace(x)
    with exact_products(x):
        if method in ("cholesky", "newton_schulz"):
            return cholesky_inverse(x, damping)
        if method == "matrix_inverse":
            return symmetrized(_each(xp.linalg.inv, add_to_diagonal(x, damping)))
        if method == "eig":
            return eigen_power(*psd_eigh(x, clip=None), -1.0, damping)
    raise ValueError(f"`method` must be one of {get_args(InverseMethod)}; got {method!r}.")


def posdef_inv(x: Array, damping: Scalar, method: InverseMethod = "cholesky") -> Array:
    """As `psd_inv`, not finite on failure in CuPy as well: the name that the reference has."""
    inverse = psd_inv(x, damping, method)
    if not array_api_compat.is_cupy_array(x):
        return inverse
    # Nothing tells of a failed solver but what it returns.
    xp, residual = array_namespace(x), inverse_checks(x, inverse, damping)[0]
    return xp.where(residual <= 1e-2, inverse, xp.nan)


def posdef_eig(x: Array, method: EigMethod = "self_adjoint") -> tuple[Array, Array]:
    """``(absolute eigenvalues, eigenvectors)``, or with ``"svd"`` singular values and vectors."""
    if method == "svd":
        u, s, _ = svd(x)
        return s, u
    w, v = psd_eigh(x, clip=None)
    return array_namespace(w).abs(w), v


@KernelOp
def inverse_checks(x: Array, inverse: Array, damping: Scalar) -> Array:
    """How well `inverse` inverts ``x + damping * I``: shape [2], not finite if it does not.

    First the residual, the largest entry of ``(x + damping I) inverse p - p`` for one fixed vector
    `p` of size 1: a probe, in O(n^2), that tells a working inverse from a failed one without a
    matrix product. Then the condition number in the 1-norm, exact up to the sign of entries of
    `x` on the diagonal, which of a second moment are not negative. Of stacks [k, n, n] of
    matrices: shape [k, 2].
    """
    xp = array_namespace(x, inverse)
    index = xp.arange(x.shape[-1], dtype=x.dtype, device=device_of(x))
    probe = xp.cos(index * index)[:, None]
    image = xp.matmul(inverse, probe)
    residual = xp.max(xp.abs(xp.matmul(x, image) + damping * image - probe), axis=(-2, -1))
    condition = (_one_norm(x) + damping) * _one_norm(inverse)
    return xp.stack([residual, condition], axis=-1)


def _one_norm(x: Array) -> Array:
    """Largest column sum of absolute values."""
    xp = array_namespace(x)
    return xp.max(xp.sum(xp.abs(x), axis=-2), axis=-1)


def has_float64(x: Array) -> bool:
    """True if the array's library and device compute in float64."""
    xp = array_namespace(x)
    if array_api_compat.is_jax_array(x):  # unless told otherwise, it has float32 for every float
        return bool(xp.asarray(1.0).dtype == xp.float64)
    try:
        xp.zeros((), dtype=xp.float64, device=device_of(x))
    except Exception:
        return False
    return True


@functools.cache
def _triangular_solver(library: str) -> Callable[..., Array] | None:
    """The triangular solver that goes with a library's arrays, or None."""
    home = {"numpy": "scipy", "cupy": "cupyx.scipy", "jax": "jax.scipy"}.get(library)
    if home is None or find_spec(home.partition(".")[0]) is None:
        return None
    solve = importlib.import_module(f"{home}.linalg").solve_triangular
    # SciPy and CuPy look for NaN first unless told not to; on a device that would wait for it.
    return solve if library == "jax" else functools.partial(solve, check_finite=False)


def _is_linalg_error(error: Exception) -> bool:
    """True for the exception by which a library says that a decomposition failed."""
    return any("LinAlgError" in kind.__name__ for kind in type(error).__mro__)


# ---------------------------------------------------------------------------------------------
# Kernels

cholesky_inverse.register(
    "numba",
    "kfac_xp.kernels.cpu.cholesky_inverse:cholesky_inverse",
    accepts=Condition("float32 and float64", lambda x, damping: is_one_float(x)),
)
inverse_checks.register(
    "numba",
    "kfac_xp.kernels.cpu.cholesky_inverse:inverse_checks",
    accepts=Condition(
        "matrices that are both float32 or both float64",
        lambda x, inverse, damping: is_one_float(x, inverse),
    ),
)
