"""LAPACK for NumPy arrays through SciPy, where that is installed.

NumPy calls LAPACK too, but copies every matrix in and out of column order, and has no routine that
inverts from a Cholesky factor.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


@functools.cache
def lapack(name: str, dtype: str) -> Callable[..., Any] | None:
    """SciPy's wrapper of a routine, such as "potrf", for a dtype's letter; None without SciPy."""
    if find_spec("scipy") is None:
        return None
    return importlib.import_module("scipy.linalg.lapack").get_lapack_funcs(name, dtype=dtype)
