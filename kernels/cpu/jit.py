"""How every CPU kernel is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

_OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    # Other Python threads run on while a kernel does.
    "nogil": True,
    # Sums may be regrouped into vector lanes. The rest of "fast" stays off: it would let the
    # compiler assume that there is no NaN.
    "fastmath": {"contract", "reassoc", "nsz"},
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with Numba on first call, and keep the machine code on disk where that is possible.

    The cache of a kernel is renewed when its own file changes, and only then: compiled helpers of
    a kernel belong in the kernel's file.

    Kernels are serial: waking Numba's threads can cost more than a small call, and one of its
    threading layers ends the process when two Python threads enter parallel kernels. What gains
    from threads takes Python's (`threads`).
    """
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        # Raised where neither the installation nor a user folder can be written.
        if "no locator available" not in str(error):
            raise
        return njit(**_OPTIONS)(function)
