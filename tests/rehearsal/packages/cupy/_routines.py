"""CuPy's functions: NumPy's, under CuPy's signatures, of arrays of the device alone.

What differs is written out. Read in cupy/_core/_kernel.pyx (ufuncs: no ``where=``; only arrays,
Python's and NumPy's scalars), _core/core.pyx (`array`), _core/_routines_manipulation.pyx,
_sorting/search.py, _indexing/indexing.py.
"""

import functools

import numpy as np

from cupy import _capture, _core, _rounding
from cupy._array import (
    filled_with_rubbish,
    host,
    ndarray,
    new,
    quiet,
    supported,
    view_of,
)
from cupy._indexing import index_of
from cupy._signatures import checked, names, used

_VIEWS = {
    *("reshape", "squeeze", "swapaxes", "transpose", "permute_dims", "diagonal", "flip"),
    *("expand_dims", "moveaxis", "matrix_transpose", "broadcast_arrays"),
}
# Their first argument is no array, in CuPy either, or a sequence of arrays.
_OF_ANYTHING = {"arange", "eye", "full", "zeros", "ones", "result_type", "broadcast_arrays"}


def wrapped(out, owner=None):
    """Results as arrays of the device: numbers as 0-d arrays."""
    if isinstance(out, (np.ndarray, np.generic)):
        out = np.asarray(out)
        if owner is not None and np.shares_memory(out, owner._a):
            return view_of(owner, out)
        return new(np.array(out, order="C"))
    if isinstance(out, (tuple, list)):
        parts = [wrapped(part, owner) for part in out]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
    return out


def deep_host(x):
    """`host`, also of lists and tuples of arrays."""
    if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
        return type(x)(map(deep_host, x))
    return host(x)


def routine(owner, name, function=None):
    """NumPy's function under the signature that the real CuPy has."""
    signature = names(owner)[name]
    if function is None:
        module = functools.reduce(getattr, owner.split(".")[1:], np)
        function = getattr(module, name)
    if name in ("sum", "mean"):
        function = _rounding.backwards(function)
    first = next(iter(signature.parameters))

    def call(*args, **kwargs):
        used.add((owner, name))
        bound = signature.bind(*args, **kwargs)
        given = bound.args
        if name not in _OF_ANYTHING and not isinstance(given[0], ndarray):
            raise TypeError(f"cupy's {name} takes no {type(given[0])}: `{first}` is not an array")
        with quiet():
            out = function(
                *map(deep_host, given), **{k: deep_host(v) for k, v in bound.kwargs.items()}
            )
        base = given[0] if name in _VIEWS and isinstance(given[0], ndarray) else None
        return wrapped(out, base)

    call.__name__ = name
    return _capture.captured(call)


class ufunc:  # noqa: N801
    """An elementwise function."""

    def __init__(self, name, nin, nout):
        self.__name__, self.nin, self.nout = name, nin, nout
        self._ufunc = getattr(np, name)

    @_capture.captured
    @checked("cupy.ufunc", "at")
    def at(self, a, indices, b=None):
        """Atomic additions; of other functions a few, which the library does not use."""
        if self.__name__ != "add":
            raise NotImplementedError(f"`cupy_{self.__name__}.at` is not supported yet")
        a._scatter_add(indices, b)

    @_capture.captured
    def __call__(self, *args, out=None, dtype=None, casting="same_kind"):
        used.add(("cupy", self.__name__))
        if not self.nin <= len(args) <= self.nin + self.nout:
            raise TypeError(f"Wrong number of arguments for 'cupy_{self.__name__}'")
        args, given = args[: self.nin], args[self.nin :]
        if given:
            (out,) = given
        for x in args:
            if not isinstance(x, (ndarray, bool, int, float, complex, np.generic)):
                raise TypeError(f"Unsupported type {type(x)}")
        options = {} if dtype is None else {"dtype": dtype}
        with quiet():
            if out is None:
                found = self._ufunc(*map(host, args), casting=casting, **options)
                if self.__name__ in _rounding.FUNCTIONS:
                    found = _rounding.nudged(found)
                parts = found if isinstance(found, tuple) else (found,)
                for part in parts:
                    supported(part.dtype)
                return wrapped(found)
            if not isinstance(out, ndarray):
                raise TypeError(f"return arrays must be of cupy.ndarray, not {type(out)}")
            self._ufunc(*map(host, args), out=out._a, casting=casting, **options)
            return out


# ---------------------------------------------------------------------------------------------
# Written out


@checked("cupy", "array")
def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    """Of NumPy arrays and numbers; of arrays of the device, and sequences of them of one shape."""
    if subok:
        raise NotImplementedError
    if isinstance(obj, ndarray):
        dtype = obj.dtype if dtype is None else dtype
        if copy is False and np.dtype(dtype) != obj.dtype:
            raise ValueError("Unable to avoid copy while creating an array as requested.")
        return obj.astype(dtype, order=order or "K", copy=bool(copy))
    if copy is False:
        raise ValueError("Unable to avoid copy while creating an array as requested.")
    made = np.array(_of_the_host(obj), dtype=dtype, order=order or "K", ndmin=ndmin)
    supported(made.dtype)
    return new(np.array(made, order="F" if made.flags.fnc and order != "C" else "C"))


def _of_the_host(obj):
    """Sequences hold arrays of the device alone, of one shape, or none."""
    if not isinstance(obj, (list, tuple)):
        return obj
    parts = [_of_the_host(x) for x in obj]
    arrays = [x for x in obj if isinstance(x, ndarray)]
    if not arrays:
        return parts
    if len(arrays) < len(obj) or len({x.shape for x in arrays}) > 1:
        arrays[0].__array__()  # as NumPy is asked to look into them
    return np.stack([x._a for x in arrays])


@checked("cupy", "asarray")
def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    """See `array`."""
    return array(a, dtype, copy, order)


@_capture.captured
@checked("cupy", "ascontiguousarray")
def ascontiguousarray(a, dtype=None):
    """The array itself where it is contiguous, else a copy."""
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (got {type(a).__name__})")
    is_same = dtype is None or np.dtype(dtype) == a.dtype
    return a if is_same and a._a.flags.c_contiguous else new(np.array(a._a, dtype, order="C"))


@checked("cupy", "asnumpy")
def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    """On the host."""
    return a.get(stream, order, out) if isinstance(a, ndarray) else np.asarray(a, order=order)


@_capture.captured
@checked("cupy", "empty")
def empty(shape, dtype=float, order="C"):
    """Of what is not to be relied upon."""
    return new(filled_with_rubbish(shape, dtype, order))


@_capture.captured
@checked("cupy", "empty_like")
def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    """See `empty`."""
    dtype = prototype.dtype if dtype is None else dtype
    return new(filled_with_rubbish(prototype.shape if shape is None else shape, dtype))


@checked("cupy", "broadcast_to")
def broadcast_to(array, shape):
    """A view, which in CuPy can be written."""
    if not isinstance(array, ndarray):
        raise TypeError("Argument 'array' has incorrect type")
    return view_of(array, np.broadcast_to(array._a, shape))


@_capture.captured
@checked("cupy", "take")
def take(a, indices, axis=None, out=None):
    """Indices wrap around."""
    if not isinstance(indices, ndarray):
        indices = new(np.asarray(indices, dtype=int))  # moved to the device by CuPy
    if axis is None:
        a, axis = a.ravel(), 0
    key = (*[slice(None)] * (axis % a.ndim), indices)
    return new(np.array(a._a[index_of(a, key)[0]], order="C"))


@_capture.captured
@checked("cupy", "take_along_axis")
def take_along_axis(a, indices, axis):
    """Indices wrap around."""
    if a.ndim != indices.ndim:
        raise ValueError("`indices` and `a` must have the same number of dimensions")
    return new(np.take_along_axis(a._a, indices._a % a.shape[axis], axis))


@_capture.captured
@checked("cupy", "searchsorted")
def searchsorted(a, v, side="left", sorter=None):
    """Of an array and a Python scalar or an array."""
    if not isinstance(a, ndarray):
        raise NotImplementedError("Only int or ndarray are supported for a")
    if not isinstance(v, (ndarray, int, float, complex)):
        raise NotImplementedError("Only python scalars or ndarrays are supported for v")
    found = np.searchsorted(a._a, host(v), side, sorter=None if sorter is None else sorter._a)
    return new(np.asarray(found, dtype=np.int64))


@_capture.captured
@checked("cupy", "where")
def where(condition, x=None, y=None):
    """With one argument the host waits, as in `nonzero`."""
    if (x is None) != (y is None):
        raise ValueError("Must provide both 'x' and 'y' or neither.")
    if x is None:
        return nonzero(condition)
    for part in (condition, x, y):
        if not isinstance(part, (ndarray, bool, int, float, complex, np.generic)):
            raise TypeError(f"Unsupported type {type(part)}")
    return wrapped(np.where(host(condition), host(x), host(y)))


@checked("cupy", "nonzero")
def nonzero(a):
    """The host waits for how many there are."""
    int(new(np.asarray(np.count_nonzero(a._a))))
    return wrapped(np.nonzero(a._a))


@checked("cupy", "matmul")
def matmul(*args, out=None, **kwargs):
    """Products; of float32 after rounding to TF32 where that is the compute type."""
    for x in args:
        _capture.refuse("cuBLAS")
        if not isinstance(x, ndarray):
            raise TypeError(f"Argument 'a' has incorrect type (expected ndarray, got {type(x)})")
    x, y = (_core.rounded(a._a) for a in args)
    with quiet():
        found = _rounding.matmul(x, y, **kwargs)
    if out is None:
        return wrapped(found)
    out._a[...] = found
    return out


@checked("cupy", "tensordot")
def tensordot(a, b, axes=2):
    """See `matmul`."""
    _capture.refuse("cuBLAS")
    return wrapped(_rounding.tensordot(_core.rounded(host(a)), _core.rounded(host(b)), axes))


@checked("cupy", "get_default_memory_pool")
def get_default_memory_pool():
    """The pool."""
    from cupy import _memory

    return _memory.default


def _joined(name):
    function = getattr(np, name)

    @_capture.captured
    @checked("cupy", name)
    def join(tup, *args, **kwargs):
        parts = list(tup)
        for part in parts:
            if not isinstance(part, ndarray):
                raise TypeError(f"Only cupy arrays can be concatenated; got {type(part)}")
        return wrapped(function([p._a for p in parts], *args, **kwargs))

    return join


concatenate, concat, stack = map(_joined, ("concatenate", "concat", "stack"))
