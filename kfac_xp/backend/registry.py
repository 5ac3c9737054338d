"""Ops with a reference and kernels, and which implementation serves a call."""

from __future__ import annotations

import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import array_api_compat
import numpy as np

from kfac_xp.backend.arrays import device_kind, library_of
from kfac_xp.geometry import ConvGeometry
from kfac_xp.measurements import KernelTiming, Shapes, nearest_timing
from kfac_xp.typing import Array

REFERENCE = "reference"
BACKENDS = (REFERENCE, "numba", "cuda")


@dataclass(frozen=True)
class Condition:
    """A test on an op's arguments, with the words that `explain` prints."""

    words: str
    holds: Callable[..., bool]


ALWAYS = Condition("every call", lambda *args, **kwargs: True)
UNMEASURED = Condition(
    "no sizes so far: it is still to be measured on a GPU", lambda *args, **kwargs: False
)
"""Of a CUDA kernel that is taken only where `kfac_xp.calibrate` finds it faster on the device."""

# A kernel is taken where it was measured to be so many times as fast: timings err.
_MARGIN = 1.1


@dataclass(frozen=True)
class Implementation:
    """A kernel that may replace an op's reference."""

    backend: str
    path: str
    accepts: Condition
    wins: Condition

    @functools.cached_property
    def function(self) -> Callable[..., Array]:
        """The kernel, imported when it is first wanted."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


_forced: ContextVar[str | None] = ContextVar("kfac_xp_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one implementation of every op within the ``with`` block, whatever the sizes.

    `name` is ``"reference"`` (the Array API body), ``"numba"`` (NumPy arrays) or ``"cuda"``
    (CuPy arrays). An op that has kernels under that name, and none that takes its arrays, raises
    ValueError; one that has none at all runs its reference.

    Raises
    ------
    ValueError
        If `name` is not one of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"`name` must be one of {BACKENDS}; got {name!r}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


_ops: weakref.WeakSet[KernelOp] = weakref.WeakSet()


def kernel_ops() -> list[KernelOp]:
    """The library's ops, by name."""
    own = (op for op in _ops if op.reference.__module__.startswith("kfac_xp."))
    return sorted(own, key=lambda op: op.name)


@dataclass(eq=False)
class KernelOp:
    """An operation with a reference body and kernels that replace it where they win.

    The reference is pure Array API, complete, and the specification. Used as a decorator on it;
    `checks` decorates the function that validates arguments before anything is chosen. Which sizes
    a CUDA kernel wins for depends on the card: what `kfac_xp.calibrate` measured on it decides, and
    the kernel's own condition where nothing was measured.
    """

    reference: Callable[..., Array]
    implementations: list[Implementation] = field(default_factory=list)
    _check: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.reference)
        _ops.add(self)

    @property
    def name(self) -> str:
        """Name of the reference function."""
        return self.reference.__name__

    def checks(self, function: Callable[..., None]) -> Callable[..., None]:
        """Decorate the function that validates the op's arguments."""
        self._check = function
        return function

    def register(
        self, backend: str, path: str, *, accepts: Condition = ALWAYS, wins: Condition = ALWAYS
    ) -> None:
        """Add a kernel at ``"module:function"`` with the op's signature.

        `accepts` says what the kernel can do, `wins` where a benchmark showed it to be faster.
        """
        self.implementations.append(Implementation(backend, path, accepts, wins))

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Check the arguments, choose an implementation and run it."""
        if self._check is not None:
            self._check(*args, **kwargs)
        return self._choose(args, kwargs)[0](*args, **kwargs)

    def chosen(self, *args: Any, **kwargs: Any) -> Callable[..., Array]:
        """The implementation that would run on these arguments."""
        return self._choose(args, kwargs)[0]

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """Which implementation would run on these arguments, and why."""
        if self._check is not None:
            self._check(*args, **kwargs)
        return f"{self.name}: {self._choose(args, kwargs)[1]}"

    def _choose(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Array], str]:
        """What to call, and why."""
        forced = _forced.get()
        if forced == REFERENCE:
            return self.reference, "reference, because `use_backend` asks for it"
        if forced is not None and all(i.backend != forced for i in self.implementations):
            return self.reference, f"reference, because it has no {forced} kernel at all"
        kernel, refusal = self._kernel_for(args[0] if args else kwargs[self._first_parameter])
        if kernel is not None and not kernel.accepts.holds(*args, **kwargs):
            refusal = f"the {kernel.backend} kernel takes {kernel.accepts.words}"
            kernel = None
        if forced is not None:
            if kernel is not None and kernel.backend != forced:
                refusal = f"its arrays are served by {kernel.backend!r}"
            if kernel is None or refusal:
                raise ValueError(
                    f"`use_backend({forced!r})` cannot serve this call of `{self.name}`: "
                    f"{refusal}. Use `use_backend('reference')`, or none."
                )
            return kernel.function, f"{forced}, because `use_backend` asks for it"
        if kernel is None:
            return self.reference, f"reference, because {refusal}"
        if kernel.backend == "cuda":
            kind, timing = self._timed(args, kwargs)
            if timing is not None:
                return self._by_timing(kernel, timing, kind)
            if kernel.wins is UNMEASURED:
                return self.reference, (
                    "reference, because the cuda kernel was never measured on this device; run "
                    "kfac_xp.calibrate()"
                )
        if kernel.wins.holds(*args, **kwargs):
            won = f"which was measured to win for {kernel.wins.words}"
            return kernel.function, f"{kernel.backend}, {won}"
        lost = f"{kernel.backend} was measured to win only for {kernel.wins.words}"
        return self.reference, f"reference, because {lost}"

    def _timed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, KernelTiming | None]:
        """The kind of device of the first argument, and the timing there that is nearest."""
        kind = device_kind(args[0] if args else kwargs[self._first_parameter])
        dtype, shapes = self.sizes(*args, **kwargs)
        return kind, nearest_timing(kind, self.name, dtype, shapes)

    def _by_timing(
        self, kernel: Implementation, timing: KernelTiming, kind: str
    ) -> tuple[Callable[..., Array], str]:
        where = ", ".join("x".join(map(str, shape)) for shape in timing.shapes)
        where = f"at a similar size ({where}) on {kind}"
        times = f"{timing.speed:.1f} times as fast as the reference"
        if timing.speed >= _MARGIN:
            return kernel.function, (
                f"{kernel.backend}, which `calibrate` measured {times} {where}"
            )
        lost = f"`calibrate` measured the {kernel.backend} kernel {times} {where}"
        return self.reference, f"reference, because {lost}"

    def sizes(self, *args: Any, **kwargs: Any) -> tuple[str, Shapes]:
        """What timings of the op are kept by: the dtype, and the shapes of what it must be given.

        A geometry counts with its kernel. Optional arguments, numbers and 0-d arrays play no role.
        """
        given = self._signature.bind(*args, **kwargs).arguments
        dtype, shapes = "", []
        for name, parameter in self._signature.parameters.items():
            value = given.get(name)
            if parameter.default is not parameter.empty or value is None:
                continue
            if isinstance(value, ConvGeometry):
                shapes.append(value.kernel)
            elif getattr(value, "shape", ()):
                dtype = dtype or str(value.dtype).rpartition(".")[2]
                shapes.append(tuple(value.shape))
        return dtype, tuple(shapes)

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.reference)

    @functools.cached_property
    def _first_parameter(self) -> str:
        return next(iter(self._signature.parameters))

    def _kernel_for(self, x: Array) -> tuple[Implementation | None, str]:
        backend, refusal = _kernel_backend(x)
        for implementation in self.implementations:
            if implementation.backend == backend:
                return implementation, ""
        return None, refusal or f"there is no {backend} kernel for it"


class Explains(Protocol):
    """Anything that has several ways to compute its result: a `KernelOp`, `patch_covariance`."""

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """Which one would run on these arguments, and why."""


def explain(op: Explains, *args: Any, **kwargs: Any) -> str:
    """Say which implementation of `op` would run on these arguments, and why.

    >>> import numpy as np, kfac_xp
    >>> x = np.ones((4, 3), dtype=np.float32)
    >>> print(kfac_xp.explain(kfac_xp.squared_outer, x, x))  # doctest: +ELLIPSIS
    squared_outer: reference, because ...
    """
    return op.explain(*args, **kwargs)


def _kernel_backend(x: Array) -> tuple[str | None, str]:
    """The backend whose kernels take `x`, or None and the reason why there is none."""
    if type(x) is np.ndarray:
        return "numba", ""
    if array_api_compat.is_numpy_array(x):
        return "numba", ""
    if array_api_compat.is_cupy_array(x):
        refusal = why_no_cuda()
        return (None, refusal) if refusal else ("cuda", "")
    return None, f"{library_of(x)} arrays have no kernels"


@functools.cache
def why_no_cuda() -> str:
    """Why Numba cannot launch CUDA kernels here; empty if it can."""
    try:
        config = importlib.import_module("numba").config
        if getattr(config, "ENABLE_CUDASIM", 0):  # the simulator claims to be available
            return "Numba runs its CUDA simulator"
        if not importlib.import_module("kfac_xp.kernels.cuda.target").load_target().is_available():
            return "Numba finds no CUDA device or toolkit"
        return ""
    except Exception as error:  # releases that do not go together fail in many ways
        return f"Numba's CUDA target fails ({type(error).__name__}: {error})"
