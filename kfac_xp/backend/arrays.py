"""Which library and device an array belongs to, its dtype, and what can be read for free."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import Any

import array_api_compat
import numpy as np

from kfac_xp.measurements import HOST
from kfac_xp.typing import Array, Namespace, Scalar

# Found once for each type of array: that takes as long as several small operations.
_namespaces: dict[type, Namespace] = {}


def array_namespace(*arrays: Array) -> Namespace:
    """Namespace of the arrays' common library.

    Raises
    ------
    TypeError
        If the arrays come from several libraries, or one is not an array.
    """
    found = None
    for a in arrays:
        known = _namespaces.get(type(a))
        if known is None or known is not (found or known):
            break
        found = known
    else:
        if found is not None:
            return found
    try:
        xp = array_api_compat.array_namespace(*arrays)
        # JAX's gradients of integers are NumPy arrays, of a dtype of the kind "V".
        if len(arrays) == 1 and getattr(arrays[0].dtype, "kind", None) != "V":
            _namespaces[type(arrays[0])] = xp
        return xp
    except TypeError as error:
        kinds = sorted({f"{type(a).__module__}.{type(a).__qualname__}" for a in arrays})
        raise TypeError(
            f"the arrays of one call must all belong to one array library; got {', '.join(kinds)}. "
            "Convert them first, for example with `xp.asarray`."
        ) from error


def library_of(x: Array) -> str:
    """Name of the array library of `x`: "numpy", "cupy", "torch", "jax", "array_api_strict", ..."""
    return array_namespace(x).__name__.removeprefix("array_api_compat.").partition(".")[0]


def is_tracer(x: Array) -> bool:
    """True inside ``jax.jit``, where an array has a shape and no value."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def device_of(x: Array) -> Any:
    """Device of an array; None for a tracer, which has none yet."""
    if type(x) is np.ndarray:
        return "cpu"
    return None if is_tracer(x) else array_api_compat.device(x)


def device_kind(x: Array) -> str:
    """Whose measurements hold for `x`: the model of a CuPy array's device, else `HOST`."""
    if type(x) is np.ndarray or not array_api_compat.is_cupy_array(x):
        return HOST
    return gpu_model(x.device.id)


@functools.cache
def usable_cupy() -> Any:
    """CuPy, if it is installed, can be imported and has a device; else None."""
    if find_spec("cupy") is None:
        return None
    try:
        cupy = importlib.import_module("cupy")
        return cupy if cupy.cuda.is_available() else None
    except Exception:  # an installation that misses a library fails in many ways
        return None


@functools.cache
def gpu_model(index: int) -> str:
    """The model of one of CuPy's devices, such as "NVIDIA H200"."""
    from cupy.cuda import runtime

    return runtime.getDeviceProperties(index)["name"].decode()


def require_one_place(**arrays: Array) -> Namespace:
    """Common namespace of the named arrays, which must also be on one device.

    Raises
    ------
    TypeError
        If the arrays belong to several libraries.
    ValueError
        If they are on several devices.
    """
    xp = array_namespace(*arrays.values())
    if array_api_compat.is_numpy_namespace(xp):  # it has one device
        return xp
    devices = {name: device_of(a) for name, a in arrays.items()}
    if len({str(d) for d in devices.values() if d is not None}) > 1:
        places = ", ".join(f"`{name}` on {d}" for name, d in devices.items())
        raise ValueError(f"arrays must be on one device; got {places}. Move them to one first.")
    return xp


def is_readable(x: Array) -> bool:
    """True where looking at values is free: host memory, and not inside a trace."""
    if type(x) is np.ndarray:
        return True
    if is_tracer(x):
        return False
    if array_api_compat.is_numpy_array(x):
        return True
    if array_api_compat.is_cupy_array(x):
        return False
    if array_api_compat.is_jax_array(x):
        return all(d.platform == "cpu" for d in x.devices())
    return "cpu" in str(array_api_compat.device(x)).lower()


def as_number(x: Scalar) -> Scalar:
    """A Python float for any host number, so that it never widens an array's dtype.

    A ``np.float64`` would turn float32 work into float64. A 0-d array of a device library is
    returned as it is: reading it would wait for the device.
    """
    if isinstance(x, (int, float)) or array_api_compat.is_numpy_array(x):
        return float(x)
    return x


def as_scalar_like(x: Scalar, like: Array) -> Scalar:
    """`x` as a Python float, or as a 0-d array of the dtype of `like`: it widens nothing."""
    x = as_number(x)
    return x if isinstance(x, float) else cast(x, like.dtype)


def statistics_dtype(x: Array, dtype: Any = None) -> Any:
    """The dtype in which statistics of `x` accumulate: `dtype`, else at least float32."""
    if dtype is not None:
        return dtype
    xp = array_namespace(x)
    if not xp.isdtype(x.dtype, "real floating"):
        raise TypeError(f"expected a real floating array, got dtype {x.dtype}. Convert it first.")
    return xp.float32 if xp.finfo(x.dtype).bits < 32 else x.dtype


def itemsize(x: Array) -> int:
    """Bytes of one element of a real floating array."""
    return array_namespace(x).finfo(x.dtype).bits // 8


def cast(x: Array, dtype: Any) -> Array:
    """`x` in this dtype; not copied when it has it already."""
    return array_namespace(x).astype(x, dtype, copy=False)


_FLOATS = frozenset((np.dtype(np.float32), np.dtype(np.float64)))
_FLOATS_AND_HALF = _FLOATS | {np.dtype(np.float16)}


def is_one_float(*arrays: Array | None, half: bool = False) -> bool:
    """True if the arrays given, of NumPy or CuPy, are all float32 or all float64 (or float16)."""
    dtypes = {a.dtype for a in arrays if a is not None}
    return len(dtypes) == 1 and not dtypes.isdisjoint(_FLOATS_AND_HALF if half else _FLOATS)


def detached(x: Array) -> Array:
    """`x` without PyTorch's record of how it was made, which an average would keep alive."""
    if array_api_compat.is_torch_array(x) and x.requires_grad:
        return x.detach()
    return x


def as_statistics(x: Array, dtype: Any = None) -> Array:
    """`x` in its statistics dtype; not copied when it has it already."""
    if dtype is None and type(x) is np.ndarray and x.dtype in _FLOATS:  # soon told
        return x
    return cast(x, statistics_dtype(x, dtype))


def kept_like(make: Callable[..., tuple[np.ndarray, ...]]) -> Callable[..., tuple[Array, ...]]:
    """Decorate a function that makes tables: they are made once, and moved once to each device.

    (Of CuPy's to each stream: another one does not wait for a copy that this one has queued.)
    `make` takes hashable arguments. The decorated function takes an array before these, in whose
    library and on whose device the tables are returned. They must not be written.
    """
    on_host = functools.lru_cache(maxsize=256)(make)
    devices: dict[tuple[Namespace, str], Any] = {}

    @functools.lru_cache(maxsize=256)
    def moved(xp: Namespace, name: str, stream: int, *arguments: Hashable) -> tuple[Array, ...]:
        return tuple(xp.asarray(table, device=devices[xp, name]) for table in on_host(*arguments))

    @functools.wraps(make)
    def kept(like: Array, *arguments: Hashable) -> tuple[Array, ...]:
        if type(like) is np.ndarray:
            return on_host(*arguments)
        xp, device = array_namespace(like), device_of(like)
        if is_tracer(like):  # what is made during a trace may belong to it
            return tuple(xp.asarray(table) for table in on_host(*arguments))
        devices[xp, str(device)] = device
        return moved(xp, str(device), _stream_of(like), *arguments)

    return kept


def _stream_of(x: Array) -> int:
    """CuPy's current stream on the device of `x`; 0 for a library that orders its work itself."""
    if not array_api_compat.is_cupy_array(x):
        return 0
    with x.device:
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
