"""``cupy.ndarray``: a NumPy array that nothing but this package can look into.

Read in cupy/_core/core.pyx:

- NumPy arrays beside it are a TypeError, in functions and in operators; Python's and NumPy's
  scalars are taken. There is no `__index__`.
- Reductions and items are 0-d arrays. What copies to the host goes through `get`.
- Results of ufuncs are C-contiguous, whatever the operands are.
- An operand with ``__array_ufunc__ = None``, or a higher `__array_priority__`, gets the operation.
"""

import contextlib
import functools
import operator

import numpy as np

from cupy import _memory
from cupy._capture import captured
from cupy._indexing import index_of
from cupy._signatures import names, used

_SCALARS = (bool, int, float, complex, np.generic)


class ndarray:  # noqa: N801
    """An array on the device."""

    __slots__ = ("__weakref__", "_a", "_memory", "base")
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        self._set(filled_with_rubbish(shape, dtype, order))

    def _set(self, array, owner=None):
        self._a, self.base = array, None
        if owner is None:
            self._memory = _memory.Memory(array.nbytes, array.ctypes.data)
        else:
            self._memory = owner._memory
            self.base = owner if owner.base is None else owner.base
        return self

    # -----------------------------------------------------------------------------------------
    # Attributes

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    itemsize = property(lambda self: self._a.itemsize)
    strides = property(lambda self: self._a.strides)
    T = property(lambda self: view_of(self, self._a.T))
    mT = property(lambda self: view_of(self, self._a.mT))  # noqa: N815
    real = property(lambda self: view_of(self, self._a.real))
    imag = property(lambda self: view_of(self, self._a.imag))

    @property
    def device(self):
        from cupy.cuda import Device

        return Device(0)

    @property
    def data(self):
        return _memory.MemoryPointer(self._a.ctypes.data, self.device)

    @property
    def flags(self):
        return Flags(self._a.flags)

    @property
    def __cuda_array_interface__(self):
        return {**self._a.__array_interface__, "version": 3, "stream": 1}

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **kwargs):
        raise BufferError("nothing on this machine takes arrays of a CUDA device")

    # -----------------------------------------------------------------------------------------
    # To the host

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is not None:
            out[...] = self._a
            return out
        return np.array(self._a, order=order)

    def item(self):
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def tobytes(self, order="C"):
        return self.get().tobytes(order)

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __complex__(self):
        return complex(self.get())

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def __reduce__(self):
        from cupy import array

        return array, (self.get(),)

    # -----------------------------------------------------------------------------------------
    # Copies and views

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if subok is not None:
            raise TypeError("subok is not supported yet")
        if casting is not None:
            raise TypeError("casting is not supported yet")
        with quiet():
            out = self._a.astype(supported(dtype), order=order, copy=copy)
        return self if out is self._a else new(out)

    def copy(self, order="C"):
        return new(self._a.copy(order))

    def view(self, dtype=None, type=None):
        return view_of(self, self._a.view() if dtype is None else self._a.view(dtype))

    def fill(self, value):
        if isinstance(value, ndarray):
            value = value._a
        elif isinstance(value, np.ndarray) and value.shape:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self._a.fill(value)

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise ValueError("Shape or dtype mismatch")
        self._a[...] = arr

    # -----------------------------------------------------------------------------------------
    # Items

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    @captured
    def __getitem__(self, key):
        key, is_advanced = index_of(self, key)
        out = self._a[key]
        return new(np.asarray(out)) if is_advanced else view_of(self, np.asarray(out))

    @captured
    def __setitem__(self, key, value):
        key, is_advanced = index_of(self, key)
        if isinstance(value, ndarray):
            value = value._a
            while value.ndim and value.shape[0] == 1:  # of leading axes of length 1, as NumPy
                value = value[0]
        elif isinstance(value, np.ndarray) and value.shape and not is_advanced:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self._a[key] = value

    def _scatter_add(self, slices, value):
        key, is_advanced = index_of(self, slices)
        atomic = ("int32", "float16", "float32", "float64", "uint32", "uint64")
        if is_advanced and self.dtype.name not in atomic:
            raise TypeError(f"scatter_add only supports {atomic}")
        np.add.at(self._a, key, value._a if isinstance(value, ndarray) else value)

    # -----------------------------------------------------------------------------------------
    # NumPy's protocols

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        import cupy

        own = getattr(cupy, ufunc.__name__, None)
        arrays = (ndarray, np.ndarray, *_SCALARS)
        if method != "__call__" or own is None or not all(isinstance(x, arrays) for x in inputs):
            return NotImplemented
        if "out" in kwargs:
            (kwargs["out"],) = kwargs["out"]
        return own(*inputs, **kwargs)

    def __array_function__(self, func, types, args, kwargs):
        import cupy

        path = func.__module__.split(".")[1:]
        try:
            own = getattr(functools.reduce(getattr, path, cupy), func.__name__)
        except AttributeError:
            return NotImplemented
        if own is func or not all(t in (ndarray, np.ndarray) for t in types):
            return NotImplemented
        return own(*args, **kwargs)


class Flags:
    """The flags that CuPy has."""

    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata = flags.owndata


# ---------------------------------------------------------------------------------------------
# Making arrays


def new(array):
    """An array of its own memory."""
    return object.__new__(ndarray)._set(array)


def view_of(owner, array):
    """An array in the memory of another."""
    return object.__new__(ndarray)._set(array, owner)


def supported(dtype):
    """The dtype, if CuPy has it."""
    dtype = np.dtype(dtype)
    if dtype.kind not in "biufc" or dtype.itemsize > 16 or dtype.char in "gG":
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype


def filled_with_rubbish(shape, dtype=float, order="C"):
    """What `empty` gives: NaN or -1, so that what is not written is seen."""
    dtype = supported(float if dtype is None else dtype)
    shape = shape if isinstance(shape, (tuple, list)) else (shape,)
    for n in shape:
        operator.index(n)
    return np.full(shape, np.nan if dtype.kind in "fc" else -1 if dtype.kind == "i" else 1, dtype)


def host(x):
    """The NumPy array inside, or the scalar; NumPy arrays are refused."""
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    return x


# ---------------------------------------------------------------------------------------------
# Operators and methods


def should_use_rop(x, y):
    """Whether the other operand's reflected operator is to be tried: ``_should_use_rop``."""
    if hasattr(y, "__array_ufunc__"):
        return y.__array_ufunc__ is None
    return getattr(x, "__array_priority__", 0) < getattr(y, "__array_priority__", 0)


def _operators():
    def named(words):
        return dict(pair.split(":") for pair in words.split())

    binary = named(
        "add:add sub:subtract mul:multiply truediv:true_divide floordiv:floor_divide mod:remainder "
        "divmod:divmod pow:power lshift:left_shift rshift:right_shift and:bitwise_and "
        "or:bitwise_or xor:bitwise_xor matmul:matmul"
    )
    compared = named("lt:less le:less_equal gt:greater ge:greater_equal eq:equal ne:not_equal")

    def operation(name, is_reflected=False):
        def method(self, other):
            import cupy

            if not isinstance(other, (ndarray, np.ndarray, *_SCALARS)):
                if should_use_rop(self, other):
                    return NotImplemented
                kind = type(other).__name__
                raise TypeError(f"operand type(s) all returned NotImplemented: {name}, {kind!r}")
            pair = (other, self) if is_reflected else (self, other)
            return getattr(cupy, name)(*pair)

        return method

    def in_place(name):
        def method(self, other):
            import cupy

            return getattr(cupy, name)(self, other, self)

        return method

    def single(name):
        def method(self):
            import cupy

            return getattr(cupy, name)(self)

        return method

    for short, name in binary.items():
        setattr(ndarray, f"__{short}__", operation(name))
        setattr(ndarray, f"__r{short}__", operation(name, is_reflected=True))
        if short not in ("divmod", "matmul"):  # there is no ``@=``: Python falls back to ``@``
            setattr(ndarray, f"__i{short}__", in_place(name))
    for short, name in compared.items():
        setattr(ndarray, f"__{short}__", operation(name))
    for short, name in named("neg:negative pos:positive invert:invert abs:absolute").items():
        setattr(ndarray, f"__{short}__", single(name))


_VIEWS = {"reshape", "ravel", "squeeze", "swapaxes", "transpose", "diagonal"}
_TO_HOST = {"get", "item", "tolist", "tobytes"}
_OWN = {"take"}  # as the functions of these names


def _methods():
    """NumPy's methods under CuPy's signatures, for what is not written out above."""

    def made(name, signature):
        own = vars(ndarray).get(name)

        def method(self, *args, **kwargs):
            used.add(("cupy.ndarray", name))
            bound = signature.bind(self, *args, **kwargs)
            if own is not None:
                return own(*bound.args, **bound.kwargs)
            if name in _OWN:
                import cupy

                return getattr(cupy, name)(self, *bound.args[1:], **bound.kwargs)
            given = [tuple(map(host, a)) if isinstance(a, tuple) else host(a) for a in bound.args]
            options = {key: host(value) for key, value in bound.kwargs.items()}
            with quiet():
                out = getattr(given[0], name)(*given[1:], **options)
            if name in _VIEWS and np.shares_memory(out, self._a):
                return view_of(self, out)
            if isinstance(out, tuple):
                return tuple(new(np.ascontiguousarray(a)) for a in out)
            return None if out is None else new(np.array(out, order="C"))

        method.__name__ = name
        return method

    for name, signature in names("cupy.ndarray").items():
        if signature is not None:
            method = made(name, signature)
            setattr(ndarray, name, method if name in _TO_HOST else captured(method))


@contextlib.contextmanager
def quiet():
    """On a device nobody warns of infinities and NaN."""
    with np.errstate(all="ignore"):
        yield


_operators()
_methods()
