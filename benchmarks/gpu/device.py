"""Where the cases of a GPU run: a namespace, its clock, its memory, and PyTorch beside it.

The cases take any of these. On the host they show that the programs run, and measure nothing worth
knowing: sizes are tiny there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import time
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.peers import torch_ops
from kfac_xp.state import to_numpy


class Device:
    """The host, with NumPy's arrays; what the others share.

    Arrays that were drawn are kept until `forget`, so that all implementations of a case read the
    same memory.
    """

    name = "numpy"
    is_gpu = False
    kernel_backend = "numba"
    """Whose kernels serve its arrays; empty if none do."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[tuple[int, ...], int], Any] = {}

    def why_unusable(self) -> str:
        """What is missing; empty if nothing is."""
        return ""

    def why_without_torch(self) -> str:
        """Why PyTorch cannot be measured beside it; empty if it can."""
        return "" if find_spec("torch") is not None else "torch not installed"

    @functools.cached_property
    def xp(self) -> Any:
        """The namespace of its arrays."""
        return importlib.import_module(f"array_api_compat.{self.name}")

    def description(self) -> str:
        """What it is, for the head of the table."""
        return f"no GPU: {self.name} on the host, tiny sizes, a check of the programs alone"

    # -----------------------------------------------------------------------------------------
    # Arrays

    def draw(self, *shape: int, seed: int = 0) -> Any:
        """Normal float32 numbers, the same array whenever it is asked for."""
        if (shape, seed) not in self._drawn:
            self._drawn[shape, seed] = self.fresh(*shape, seed=seed)
        return self._drawn[shape, seed]

    def fresh(self, *shape: int, seed: int = 0) -> Any:
        """The same numbers in an array of the caller's own."""
        rng = np.random.default_rng(seed)
        return self.xp.asarray(rng.standard_normal(shape, dtype=np.float32))

    def forget(self) -> None:
        """Let go of what was drawn, and of memory that is kept for reuse."""
        self._drawn.clear()
        gc.collect()

    def as_torch(self, x: Any) -> Any:
        """A PyTorch tensor on the same memory."""
        return torch_ops.as_tensor(x)

    def on_host(self, x: Any) -> np.ndarray:
        """The values."""
        return to_numpy(x)

    # -----------------------------------------------------------------------------------------
    # Time and memory

    def wait(self) -> None:
        """Return when all that was queued is done."""

    def seconds(self, call: Callable[[], Any], calls: int) -> float:
        """Of a call among so many that are queued without waiting."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        return (time.perf_counter() - start) / calls

    def captured(self, call: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        """A function that replays what `call` queued in one run, into the arrays that it returned.

        They are NaN until then.

        Raises
        ------
        NotImplementedError
            If the arrays' library has no graphs.
        """
        raise NotImplementedError(f"{self.name} has no graphs here")

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """By how much allocated memory grows in a call, at most; None if that cannot be told.

        Of NumPy, what Python's tracemalloc is told.
        """
        gc.collect()
        tracemalloc.start()
        try:
            result = call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        del result
        return peak


class TorchDevice(Device):
    """The host, with PyTorch's arrays, which have no kernels and tell nothing of their memory."""

    name = "torch"
    kernel_backend = ""

    def why_unusable(self) -> str:
        return self.why_without_torch()

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        return None


class CupyDevice(Device):
    """CuPy's current device."""

    name = "cupy"
    is_gpu = True
    kernel_backend = "cuda"

    def __init__(self) -> None:
        super().__init__()
        os.environ["CUPY_TF32"] = "0"  # read when CuPy first multiplies

    def why_unusable(self) -> str:
        if find_spec("cupy") is None:
            return "CuPy is not installed"
        return "" if self._cupy.cuda.is_available() else "CuPy finds no CUDA device"

    def why_without_torch(self) -> str:
        why = super().why_without_torch()
        if why:
            return why
        return "" if torch_ops.start().cuda.is_available() else "PyTorch finds no CUDA device"

    @functools.cached_property
    def _cupy(self) -> Any:
        return importlib.import_module("cupy")

    @functools.cached_property
    def _torch(self) -> Any:
        return None if self.why_without_torch() else torch_ops.start()

    def description(self) -> str:
        runtime = self._cupy.cuda.runtime
        index = self._cupy.cuda.Device().id
        model = runtime.getDeviceProperties(index)["name"].decode()
        driver, own = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        return f"{model}, CUDA {own} under a driver for {driver}"

    def fresh(self, *shape: int, seed: int = 0) -> Any:
        rng = self._cupy.random.default_rng(seed)
        return rng.standard_normal(shape, dtype=self._cupy.float32)

    def forget(self) -> None:
        super().forget()
        self._cupy.get_default_memory_pool().free_all_blocks()
        if self._torch is not None:
            self._torch.cuda.empty_cache()

    def as_torch(self, x: Any) -> Any:
        return torch_ops.start().from_dlpack(x)

    def wait(self) -> None:
        self._cupy.cuda.Device().synchronize()  # waits for PyTorch's streams, too

    def captured(self, call: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        """By a CUDA graph, on a stream of its own.

        What it allocates comes from a pool of its own: replays write there again, and nobody else
        may. The pool, and an array of it, have to live as long as the graph.
        """
        stream, pool = self._cupy.cuda.Stream(non_blocking=True), self._cupy.cuda.MemoryPool()
        self.wait()  # for what the stream will read
        with stream:
            call()  # whatever is compiled, or made once, is there before
            stream.synchronize()
            with self._cupy.cuda.using_allocator(pool.malloc):
                graph, results = _recorded(stream, call)
        for x in results:
            x[...] = float("nan")

        def replay(pool: Any = pool) -> list[Any]:
            graph.launch()
            return results

        return replay

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Of CuPy's pool, and of PyTorch's allocator: an implementation uses one of them."""
        gc.collect()
        self.wait()
        torch, allocated = self._torch, 0
        if torch is not None:
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
        with high_water(self._cupy) as pool:
            result = call()
            self.wait()
        peak = pool.peak
        if torch is not None:
            peak += torch.cuda.max_memory_allocated() - allocated
        del result
        return peak


def _recorded(stream: Any, call: Callable[[], list[Any]]) -> tuple[Any, list[Any]]:
    """CuPy's graph of a call on its stream, and what the call returned."""
    stream.begin_capture()
    try:
        results = call()
    except BaseException:
        with contextlib.suppress(Exception):  # there may be no graph to be had any more
            stream.end_capture()
        raise
    return stream.end_capture(), results


def high_water(cupy: Any) -> Any:
    """A memory hook of CuPy, whose `peak` is how far the use of the pool rose above its start."""

    class HighWater(cupy.cuda.MemoryHook):
        name = "HighWater"

        def __init__(self) -> None:
            super().__init__()
            self.used = self.peak = 0

        def malloc_postprocess(self, *, mem_size: int, mem_ptr: int, **_: Any) -> None:
            self.used += mem_size if mem_ptr else 0  # 0: there was not enough
            self.peak = max(self.peak, self.used)

        def free_postprocess(self, *, mem_size: int, **_: Any) -> None:
            self.used -= mem_size

    return HighWater()


DEVICES = {device.name: device for device in (CupyDevice, Device, TorchDevice)}
"""By the names of their namespaces."""
