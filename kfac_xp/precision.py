"""How exactly float32 matrices are multiplied: float32 everywhere, unless statistics may be TF32.

The one place that knows each library's setting. Libraries read theirs on the host when a product
is launched, so that it has to hold only while Python runs through the call.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, get_args

import numpy as np

from kfac_xp.backend import library_of
from kfac_xp.typing import Array, Precision

P = ParamSpec("P")

_chosen: ContextVar[Precision | None] = ContextVar("kfac_xp_matmul_precision", default=None)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Choose the precision of the products of statistics within the ``with`` block.

    It replaces the `precision` of `FactorOptions`, for factors and for functions of arrays
    such as `compute_cov` alike. What is made of statistics later (inverses, eigenvectors, products
    with them) is always of full precision: a rounded covariance is still a covariance, but a
    rounded inverse fails its check.

    Parameters
    ----------
    precision
        ``"highest"``: float32 times float32 (the default everywhere, also where the library's own
        default is less). ``"high"``: the GPU may round float32 operands to TF32, with 10 bits of
        mantissa, and sums the products in float32. float64, and what has no such units, is as ever.

    Raises
    ------
    ValueError
        If `precision` is neither.

    Notes
    -----
    The choice holds for the current thread or task. PyTorch and CuPy keep their settings for the
    whole process: other threads that multiply while one of this library's products is launched
    see them. They are put back after each call, also after an exception.
    """
    require_precision("precision", precision)
    token = _chosen.set(precision)
    try:
        yield
    finally:
        _chosen.reset(token)


def require_precision(name: str, precision: object) -> None:
    """Refuse what is no precision."""
    if precision not in get_args(Precision):
        raise ValueError(f"`{name}` must be one of {get_args(Precision)}; got {precision!r}.")


def statistics_products(
    like: Array, default: Precision = "highest"
) -> AbstractContextManager[object]:
    """Context for products of statistics: as `matmul_precision` says, or else the `default`."""
    return _products(like, _chosen.get() or default)


def of_statistics(function: Callable[P, Array]) -> Callable[P, Array]:
    """Decorate a function that makes statistics of its first argument, an array."""
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Array:
        with statistics_products(args[0] if args else kwargs[first]):
            return function(*args, **kwargs)

    return wrapped


def exact_products(like: Array) -> AbstractContextManager[object]:
    """Context in which the library of `like` multiplies float32 by float32."""
    return _products(like, "highest")


def _products(like: Array, precision: Precision) -> AbstractContextManager[object]:
    if type(like) is np.ndarray:
        return _NOTHING
    setting = _SETTINGS.get(library_of(like))
    return _NOTHING if setting is None else _held(setting, precision)


_NOTHING = nullcontext()


@contextmanager
def _held(
    setting: Callable[[Precision], AbstractContextManager[object]], precision: Precision
) -> Iterator[None]:
    """The library's setting, and the choice that nested calls then follow."""
    before = _chosen.get()
    try:
        _chosen.set(precision)
        with setting(precision):
            yield
    finally:
        _chosen.set(before)


def _of_jax(precision: Precision) -> AbstractContextManager[object]:
    """Thread-local. JAX's own default is TF32 on a GPU."""
    return importlib.import_module("jax").default_matmul_precision(precision)


@contextmanager
def _of_torch(precision: Precision) -> Iterator[None]:
    """PyTorch's flag for products by cuBLAS, in the form of 2.9 and later or the older one.

    Reading the older one fails where a program uses the newer one, not the other way round.
    """
    matmul: Any = importlib.import_module("torch").backends.cuda.matmul
    is_new, faster = hasattr(matmul, "fp32_precision"), precision == "high"
    name = "fp32_precision" if is_new else "allow_tf32"
    wanted = ("tf32" if faster else "ieee") if is_new else faster
    before = getattr(matmul, name)
    if before == wanted:
        yield
        return
    try:
        setattr(matmul, name, wanted)
        yield
    finally:
        setattr(matmul, name, before)


@contextmanager
def _of_cupy(precision: Precision) -> Iterator[None]:
    """CuPy's compute type of float32 products, which ``CUPY_TF32=1`` sets at the start.

    On cards before compute capability 8.0, which have no TF32, CuPy would warn and take float32.
    """
    core = importlib.import_module("cupy._core")
    types = importlib.import_module("cupy._core._routines_linalg")
    before = wanted = core.get_compute_type(np.float32)
    if precision == "high":
        if int(importlib.import_module("cupy").cuda.Device().compute_capability) >= 80:
            wanted = types.COMPUTE_TYPE_TF32
    elif before in (types.COMPUTE_TYPE_TF32, types.COMPUTE_TYPE_BF16, types.COMPUTE_TYPE_FP16):
        wanted = types.COMPUTE_TYPE_DEFAULT
    if before == wanted:
        yield
        return
    try:
        core.set_compute_type(np.float32, wanted)
        yield
    finally:
        core.set_compute_type(np.float32, before)


_SETTINGS: dict[str, Callable[[Precision], AbstractContextManager[object]]] = {
    "jax": _of_jax,
    "torch": _of_torch,
    "cupy": _of_cupy,
}
