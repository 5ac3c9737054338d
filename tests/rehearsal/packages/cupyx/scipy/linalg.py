"""``cupyx.scipy.linalg``. Read in its _solve_triangular.py: no broadcasting, stacks are taken."""

import numpy as np
from cupy import linalg
from cupy._array import ndarray, new, quiet
from cupy._signatures import checked


@checked("cupyx.scipy.linalg", "solve_triangular")
def solve_triangular(
    a, b, trans=0, lower=False, unit_diagonal=False, overwrite_b=False, check_finite=False
):
    """``a^-1 b``; of one matrix the result is laid out by columns."""
    for x in (a, b):
        if not isinstance(x, ndarray):
            raise linalg.LinAlgError("cupy.linalg only supports cupy.ndarray")
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError("expected square matrix")
    if a.ndim == 2 and len(a) != len(b):
        raise ValueError("incompatible dimensions")
    if a.ndim > 2 and a.shape[:-2] != b.shape[: a.ndim - 2]:
        raise ValueError("incompatible batch count")
    if a.size == 0:  # cuBLAS wants a leading dimension of at least 1; a stack of none is no matrix
        raise ValueError("solve_triangular of CuPy takes no empty array")
    if trans or unit_diagonal or overwrite_b or check_finite:
        raise NotImplementedError
    dtype = a.dtype if a.dtype.char in "fd" else np.promote_types(a.dtype.char, "f")
    x = (np.tril(a._a) if lower else np.triu(a._a)).astype(dtype)
    with quiet():
        try:
            found = np.linalg.solve(x, b._a.astype(dtype))
        except np.linalg.LinAlgError:  # trsm divides by zero and goes on
            found = np.full(b.shape, np.inf, dtype)
    return new(np.array(found, order="F" if a.ndim == 2 else "C"))
