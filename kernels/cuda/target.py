"""Numba's CUDA target, imported whole."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

_DROPPED = "row_stack"


def load_target() -> Any:
    """``numba.cuda`` with all that it compiles kernels with, else imported with the first of them.

    numba-cuda 0.30 asks for ``numpy.row_stack`` while it is, which was another name of
    ``numpy.vstack`` before NumPy 2.5. It is lent for as long.
    """
    cuda: Any = importlib.import_module("numba.cuda")
    lends = not hasattr(np, _DROPPED)
    if lends:
        setattr(np, _DROPPED, np.vstack)
    try:
        importlib.import_module("numba.cuda.cudaimpl")
    finally:
        if lends:
            delattr(np, _DROPPED)
    return cuda
