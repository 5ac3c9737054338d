"""Seconds on a device, of anything and of kernels beside their references."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import array_api_compat
import numpy as np

from kfac_xp.backend import gpu_model, kernel_ops, usable_cupy, use_backend
from kfac_xp.calibration.examples import EXAMPLES
from kfac_xp.measurements import HOST, KernelTiming
from kfac_xp.typing import Array, Namespace

DTYPES = ("float32", "float64")

_HOST_WORK, _GPU_WORK = 2e8, 2e10
_REPEATS = 5
_TURN = 2e-3  # seconds that are filled with calls between two looks at the clock
_MAX_CALLS = 50


@dataclass(frozen=True)
class Device:
    """What is measured: the arrays of a namespace, where it creates them.

    Parameters
    ----------
    kind
        Whose measurements these are, as `kfac_xp.backend.device_kind` says.
    xp
        The arrays' namespace.
    wait
        Returns when all that was queued is done.
    work
        Multiply-adds of a measured product: enough that its call does not count.
    """

    kind: str
    xp: Namespace
    wait: Callable[[], None]
    work: float

    @property
    def is_gpu(self) -> bool:
        """Whether this is no host."""
        return self.kind != HOST

    def draw(self, *shape: int, dtype: str = "float32") -> Array:
        """Normal numbers, the same whenever they are asked for."""
        numbers = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        return self.xp.asarray(numbers, dtype=getattr(self.xp, dtype))

    def seconds(self, function: Callable[..., object], *args: Any) -> float:
        """Of one call among several that are queued without waiting: median of a few turns.

        After one that is not counted, in which kernels compile.
        """
        function(*args)
        calls = min(_MAX_CALLS, max(1, int(_TURN / max(self._turn(1, function, args), 1e-9))))
        return statistics.median(self._turn(calls, function, args) for _ in range(_REPEATS))

    def _turn(self, calls: int, function: Callable[..., object], args: tuple[Any, ...]) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            function(*args)
        self.wait()
        return (time.perf_counter() - start) / calls


def devices() -> list[Device]:
    """The host, and CuPy's current device if it has one."""
    found = [Device(HOST, array_api_compat.array_namespace(np.empty(0)), lambda: None, _HOST_WORK)]
    cupy = usable_cupy()
    if cupy is not None:
        xp = array_api_compat.array_namespace(cupy.empty(0))
        kind = gpu_model(cupy.cuda.Device().id)
        found.append(Device(kind, xp, lambda: cupy.cuda.Device().synchronize(), _GPU_WORK))
    return found


def time_kernels(device: Device, backend: str = "cuda") -> dict[str, list[KernelTiming]]:
    """Every op's kernel under `backend` beside its reference, on each of its examples.

    ``{op: timings}``, in float32 and float64. An op that has no such kernel, or none that takes an
    example, has no timing of it.
    """
    found: dict[str, list[KernelTiming]] = {}
    for op in kernel_ops():
        if all(i.backend != backend for i in op.implementations):
            continue
        for example in EXAMPLES.get(op.name, ()):
            for dtype in DTYPES:
                arguments = example.arguments(partial(device.draw, dtype=dtype))
                seconds = []
                for name in ("reference", backend):
                    with use_backend(name):
                        try:
                            call = op.chosen(*arguments)
                        except ValueError:  # the kernel does not take these arguments
                            break
                        seconds.append(device.seconds(call, *arguments))
                if len(seconds) == 2:
                    found.setdefault(op.name, []).append(
                        KernelTiming(*op.sizes(*arguments), *seconds)
                    )
    return found
