"""``cupy.linalg``. Read in cupy/linalg: failures are seen only under ``errstate(linalg="raise")``.

Otherwise a Cholesky factor of what is not positive definite is what the solver left behind, an
inverse of what is singular is not finite, and so are eigenvalues of what is not finite.
"""

import cupyx
import numpy as np
from numpy.linalg import LinAlgError

from cupy import _capture, _rounding, _routines
from cupy._array import ndarray, new, quiet
from cupy._signatures import checked, names

for _name in names("cupy.linalg"):
    globals()[_name] = getattr(_routines, _name, None) or _routines.routine("cupy.linalg", _name)


def _matrices(*arrays):
    _capture.refuse("cuSOLVER")
    for a in arrays:
        if not isinstance(a, ndarray):
            raise LinAlgError("cupy.linalg only supports cupy.ndarray")
        if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
            raise LinAlgError("Last 2 dimensions of the array must be square")
        if a.dtype == np.float16:
            raise TypeError("float16 is unsupported in linalg")


def _fail(routine):
    """Where CuPy looks at the solver's status, which the host waits for; elsewhere nothing."""
    if cupyx.geterr()["linalg"] == "raise":
        bool(new(np.asarray(True)))
        raise LinAlgError(f"Error reported by {routine} in cuSOLVER.")


def _each(function, a):
    """A function of a matrix on each of a stack."""
    flat = a.reshape(-1, *a.shape[-2:])
    parts = [function(x) for x in flat]
    if not parts:
        return np.empty_like(a)
    return np.stack(parts).reshape(*a.shape[:-2], *parts[0].shape)


@checked("cupy.linalg", "cholesky")
def cholesky(a):
    """Lower factors, made from the lower triangles alone."""
    _matrices(a)

    def factor(x):
        x = np.tril(x)
        try:
            return np.linalg.cholesky(x + np.tril(x, -1).T)
        except LinAlgError:
            _fail("potrf")
            return _left_behind(x)

    with quiet():
        return new(_each(factor, a._a))


def _left_behind(x):
    """What potrf leaves of a matrix: columns up to the pivot that failed, then the input."""
    factor = np.array(x)
    for k in range(len(x)):
        pivot = x[k, k] - factor[k, :k] @ factor[k, :k]
        if not pivot > 0:
            factor[k:, k:] = np.tril(x)[k:, k:]
            return factor
        factor[k, k] = pivot**0.5
        factor[k + 1 :, k] = (x[k + 1 :, k] - factor[k + 1 :, :k] @ factor[k, :k]) / factor[k, k]
    return factor


@checked("cupy.linalg", "eigh")
def eigh(a, UPLO="L"):
    """A plain tuple. Eigenvalues ascend, also of stacks (syevj sorts them)."""
    _matrices(a)
    with quiet():
        try:
            w, v = np.linalg.eigh(a._a, UPLO)
        except LinAlgError:
            _fail("syevd")
            w, v = np.full(a.shape[:-1], np.nan, a.dtype), np.full(a.shape, np.nan, a.dtype)
    v = v * _rounding.signs(v.shape[-1], v.dtype)
    return new(np.array(_rounding.nudged(w), order="C")), new(np.array(v, order="C"))


@checked("cupy.linalg", "eigvalsh")
def eigvalsh(a, UPLO="L"):
    """See `eigh`."""
    return eigh(a, UPLO)[0]


@checked("cupy.linalg", "inv")
def inv(a):
    """General inverses."""
    _matrices(a)

    def inverse(x):
        try:
            return np.linalg.inv(x)
        except LinAlgError:
            _fail("getrf")
            return np.full_like(x, np.inf)

    with quiet():
        return new(_rounding.nudged(_each(inverse, a._a)))


@checked("cupy.linalg", "svd")
def svd(a, full_matrices=True, compute_uv=True):
    """A plain tuple."""
    if not compute_uv:
        return new(_rounding.nudged(np.linalg.svd(a._a, compute_uv=False)))
    with quiet():
        u, s, vh = np.linalg.svd(a._a, full_matrices)
    u = u * _rounding.signs(u.shape[-1], u.dtype)
    vh = vh * _rounding.signs(vh.shape[-2], vh.dtype)[:, None]
    return tuple(new(np.array(x, order="C")) for x in (u, _rounding.nudged(s), vh))


@checked("cupy.linalg", "qr")
def qr(a, mode="reduced"):
    """A plain tuple; signs of columns of Q are not determined."""
    q, r = np.linalg.qr(a._a, mode)
    q = q * _rounding.signs(q.shape[-1], q.dtype)
    r = r * _rounding.signs(r.shape[-2], r.dtype)[:, None]
    return tuple(new(np.array(x, order="C")) for x in (q, r))


@checked("cupy.linalg", "solve")
def solve(a, b):
    """A vector on the right only beside a matrix; otherwise leading axes must be the same."""
    _matrices(a)
    if b.ndim > 1 and a.shape[:-1] != b.shape[:-1]:
        raise ValueError("a must have (..., M, M) shape and b must have (..., M, K)")
    with quiet():
        return new(np.linalg.solve(a._a, b._a))
