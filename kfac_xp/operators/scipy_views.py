"""Matrices as operators of SciPy, whose vectors are NumPy arrays on the host."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.state import to_numpy
from kfac_xp.typing import Array


def scipy_operator(
    shape: tuple[int, int],
    matmul: Callable[[Array], Array],
    rmatmul: Callable[[Array], Array],
    like: Array,
    *,
    takes_columns: bool = False,
) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator``.

    Parameters
    ----------
    shape
        Of the matrix.
    matmul, rmatmul
        Multiply by the matrix, or by its transpose, an array [n] of the library, device and dtype
        of `like`.
    like
        Where vectors from the host are moved.
    takes_columns
        Whether the functions take arrays [n, k], too.

    Raises
    ------
    ImportError
        If SciPy is not installed.
    """
    try:
        scipy_linalg = importlib.import_module("scipy.sparse.linalg")
    except ImportError as error:
        raise ImportError(
            "`to_scipy` needs SciPy, which is not installed. Install it with "
            "`pip install kfac-xp[scipy]`."
        ) from error

    xp, place = array_namespace(like), {"dtype": like.dtype, "device": device_of(like)}

    def on_host(function: Callable[[Array], Array]) -> Callable[[Any], Any]:
        return lambda x: to_numpy(function(xp.asarray(x, **place)))

    product, transposed = on_host(matmul), on_host(rmatmul)
    return scipy_linalg.LinearOperator(
        shape,
        matvec=lambda x: product(x.reshape(-1)),
        rmatvec=lambda x: transposed(x.reshape(-1)),
        matmat=product if takes_columns else None,
        rmatmat=transposed if takes_columns else None,
        dtype=to_numpy(xp.zeros((0,), **place)).dtype,
    )
