"""CUDA kernels of a rehearsal: in Numba's simulator where that is soon done, else by references.

The host's side of every kernel runs in full: conditions, shapes, grids, allocations, what becomes
of the arguments. Of the launches those run whose threads are few; where one did not, the op's
reference fills in the result. (What kernels compute is tested by ``tests/cuda``.)
"""

import functools
import os
import threading
import time

import numpy as np

MAX_THREADS = 256
"""Threads of a launch, and elements of its arrays, beyond which it is left out."""
MAX_ELEMENTS = 2000
MAX_TIMES = 2
"""How often a launch of the same sizes is simulated."""

launches = {"simulated": 0, "left out": 0}
_local = threading.local()


def install():
    """Load the simulator, and let the library believe in a device."""
    import cupy

    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    from numba import config, cuda
    from numba.cuda.simulator.kernel import BlockThread

    # Read once, when `numba.cuda` is loaded. What asks later is told that there is a device.
    del os.environ["NUMBA_ENABLE_CUDASIM"]
    config.ENABLE_CUDASIM = 0

    def as_cuda_array(x, sync=True):
        if not isinstance(x, cupy.ndarray):
            raise TypeError("*obj* doesn't implement the cuda array interface.")
        if sync:
            raise AssertionError("this would wait for the stream that fills the array")
        return x._a

    cuda.as_cuda_array = as_cuda_array
    cuda.default_stream = lambda: 0
    cuda.external_stream = lambda pointer: pointer
    BlockThread.is_alive = _is_alive

    from kfac_xp.backend import registry
    from kfac_xp.kernels.cuda import launch, target

    target.load_target = lambda: cuda

    if registry.why_no_cuda():
        raise RuntimeError(registry.why_no_cuda())
    launch.configured = _configured(launch.configured)
    registry.Implementation.function = property(_completed)


def _is_alive(thread):
    """Whether a simulated thread lives; the simulator asks without end, and here lets it run."""
    time.sleep(0)
    return threading.Thread.is_alive(thread)


def _configured(real):
    """``kernel[grid, threads, stream]`` of those launches that are soon done."""
    seen = {}

    def configured(kernel, grid, threads, stream):
        def launched(*args):
            sizes = [a.size for a in args if isinstance(a, np.ndarray)]
            for a in args:
                _require_argument(a)
            count = int(np.prod(grid)) * int(np.prod(threads))
            key = id(kernel), grid, threads, *(getattr(a, "shape", None) for a in args)
            seen[key] = seen.get(key, 0) + 1
            if count <= MAX_THREADS and max(sizes) <= MAX_ELEMENTS and seen[key] <= MAX_TIMES:
                launches["simulated"] += 1
                real(kernel, grid, threads, 0)(*args)
            else:
                launches["left out"] += 1
                _local.left_out = True

        if int(np.prod(threads)) > 1024 or min(np.ravel(grid)) < 1 or min(np.ravel(threads)) < 1:
            raise ValueError(f"no device has such a grid: {grid}, {threads}")
        return launched

    return configured


def _require_argument(a):
    """What Numba takes: arrays that are contiguous, numbers, and tuples of numbers."""
    if isinstance(a, np.ndarray):
        assert a.flags.c_contiguous, "each kernel compiles for one layout"
        return
    for number in a if isinstance(a, tuple) else (a,):
        assert isinstance(number, (bool, int, float, np.generic)), type(number)


def _completed(implementation):
    """The kernel's function; where a launch was left out, its result holds the reference's."""
    function = implementation.__dict__.get("_function")
    if function is None:
        function = _loaded(implementation)
        object.__setattr__(implementation, "_function", function)
    return function


def _loaded(implementation):
    import importlib

    from cupy._capture import captured

    module, _, name = implementation.path.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    if implementation.backend != "cuda":
        return kernel

    @captured
    @functools.wraps(kernel)
    def call(*args, **kwargs):
        from kfac_xp.backend import kernel_ops

        _local.left_out = False
        out = kernel(*args, **kwargs)
        if not _local.left_out:
            return out
        (op,) = (op for op in kernel_ops() if implementation in op.implementations)
        reference = op.reference(*args, **kwargs)
        pairs = zip(out, reference, strict=True) if isinstance(out, tuple) else [(out, reference)]
        for made, expected in pairs:
            assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
            made[...] = expected
        return out

    return call
