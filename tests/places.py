"""A place for arrays (library, device, dtype), and watches that see what leaves it for the host."""

import dataclasses
from contextlib import contextmanager
from typing import Any

import array_api_compat
import numpy as np

from kfac_xp import state
from kfac_xp.block_tridiagonal import chain
from kfac_xp.representations import ladder


@dataclasses.dataclass
class Place:
    """Where arrays are made, and by what seed."""

    xp: Any
    device: Any
    dtype: str = "float64"
    seed: int = 0

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)

    def array(self, values, dtype=None):
        dtype = getattr(self.xp, dtype or self.dtype)
        return self.xp.asarray(np.asarray(values), dtype=dtype, device=self.device)

    def normal(self, *shape):
        return self.array(self.rng.normal(size=shape))

    def positive(self, *shape):
        return self.array(self.rng.uniform(0.5, 1.5, size=shape))

    def ids(self, high, *shape):
        return self.array(self.rng.integers(0, high, size=shape), "int64")

    def covariance(self, n):
        x = self.rng.normal(size=(2 * n, n))
        return self.array(x.T @ x / (2 * n))


def arrays_in(value, path="", seen=None):
    """``(path, array)`` of everything that an object of the library, or a container, holds."""
    seen = set() if seen is None else seen
    if array_api_compat.is_array_api_obj(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from arrays_in(item, f"{path}[{key!r}]", seen)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from arrays_in(item, f"{path}[{i}]", seen)
    elif type(value).__module__.startswith("kfac_xp") and id(value) not in seen:
        seen.add(id(value))
        yield from arrays_in(getattr(value, "__dict__", {}), path, seen)


def objects_in(value, seen=None):
    """Every object of the library that an object of the library, or a container, holds."""
    seen = set() if seen is None else seen
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from objects_in(item, seen)
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from objects_in(item, seen)
    elif type(value).__module__.startswith("kfac_xp") and id(value) not in seen:
        seen.add(id(value))
        yield value
        yield from objects_in(getattr(value, "__dict__", {}), seen)


def require_place(value, place, *, same_dtype=True):
    """Every array is of the place's library and device, and every float of its dtype."""
    found = 0
    for path, a in arrays_in(value):
        found += 1
        xp = array_api_compat.array_namespace(a)
        assert xp is array_api_compat.array_namespace(place.normal(1)), path
        assert array_api_compat.device(a) == place.device, f"{path} is on {a.device}"
        if same_dtype and xp.isdtype(a.dtype, "real floating"):
            assert a.dtype == getattr(xp, place.dtype), f"{path} is {a.dtype}"
    assert found, "there was no array to look at"


class Watch:
    """Counts the library's own reads of the device, and raises at every other."""

    def __init__(self):
        self.reads = []
        self.allowed = 0

    def refuse(self, what):
        if not self.allowed:
            raise AssertionError(f"{what}: the host waits for the device")

    def reading(self, real):
        """``to_numpy`` of the library, which is how it reads: counted and let through."""

        def to_numpy(x):
            self.reads.append(tuple(x.shape))
            with self.letting():
                return real(x)

        return to_numpy

    @contextmanager
    def letting(self):
        """What happens inside may read."""
        self.allowed += 1
        try:
            yield
        finally:
            self.allowed -= 1

    def guard(self, monkeypatch, owner, names, is_far=lambda *args: True):
        """Refuse calls of some functions, or of methods of arrays that are not on the host."""
        for name in names:
            real = getattr(owner, name, None)
            if real is not None:
                monkeypatch.setattr(owner, name, self._guarded(name, real, is_far))

    def _guarded(self, name, real, is_far):
        def guarded(*args, **kwargs):
            if is_far(*args):
                self.refuse(name)
            return real(*args, **kwargs)

        return guarded


def watch_reads(monkeypatch):
    watch = Watch()
    reading = watch.reading(state.to_numpy)
    for module in (state, ladder, chain):
        monkeypatch.setattr(module, "to_numpy", reading)
    return watch


WORDS = ("__repr__", "__str__", "__format__")
SCALARS = ("__bool__", "__int__", "__float__", "__index__", "__complex__")


def watch_strict(monkeypatch, strict):
    """A device of array-api-strict: nothing but `to_numpy` brings values from it to the host.

    Shapes that depend on values, which a device has to be asked for, are switched off.
    """
    watch = watch_reads(monkeypatch)
    cls, host = type(strict.zeros(1)), strict.Device("CPU_DEVICE")
    methods = (*SCALARS, *WORDS, "__array__", "__buffer__", "__dlpack__", "to_device", "__iter__")
    watch.guard(monkeypatch, cls, methods, lambda x, *args: x.device != host)
    flags = strict.get_array_api_strict_flags()
    watch.flags = flags
    strict.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
    return watch


def unwatch_strict(strict, watch):
    """The flags are not attributes that could be put back by themselves."""
    names = ("boolean_indexing", "data_dependent_shapes")
    strict.set_array_api_strict_flags(**{name: watch.flags[name] for name in names})


def watch_cupy(monkeypatch, cupy):
    """CuPy's ways to the host and its waits, as far as they go through Python.

    What compiled code does by itself is not seen: a `Device.synchronize` cannot be replaced, and
    NVIDIA's solvers may wait inside. `cupyx.allow_synchronize` no longer sees anything.
    """
    watch = watch_reads(monkeypatch)
    methods = ("get", "item", "tolist", "__array__", "__dlpack__", *SCALARS, *WORDS)
    watch.guard(monkeypatch, cupy.ndarray, methods)
    runtime = cupy.cuda.runtime
    copies = ("memcpy", "memcpy2D", "memcpy2DFromArray", "memcpy3D")
    waits = ("deviceSynchronize", "streamSynchronize", "eventSynchronize")
    watch.guard(monkeypatch, runtime, (*copies, *waits))
    watch.guard(monkeypatch, cupy.cuda.Stream, ("synchronize",))
    watch.guard(monkeypatch, cupy.cuda.Event, ("synchronize",))
    watch.guard(monkeypatch, cupy, ("asnumpy",))
    return watch
