"""Where and how CUDA kernels run: CuPy's stream, grid sizes."""

from __future__ import annotations

import functools
import threading
from typing import Any

from numba import cuda

# Kernels step through what a grid does not cover, so that this bounds the grid and not the arrays.
# It is also the hardware's limit along y and z.
_MAX_BLOCKS = 65535


def num_blocks(size: int, threads: int) -> int:
    """Blocks of `threads` that cover `size` elements, at least one and not more than a grid has."""
    return max(1, min(-(-size // threads), _MAX_BLOCKS))


_config: Any = cuda.config
_configuring = threading.Lock()


def configured(kernel: Any, grid: Any, threads: Any, stream: Any) -> Any:
    """``kernel[grid, threads, stream]``, ready to be called with the arguments.

    Numba keeps what it has configured, by the stream's object too. Its advice that few blocks do
    not fill a device is left out, by its own setting: there is not always more to do.
    """
    with _configuring:
        advises = _config.CUDA_LOW_OCCUPANCY_WARNINGS
        _config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
        try:
            return kernel[grid, threads, stream]
        finally:
            _config.CUDA_LOW_OCCUPANCY_WARNINGS = advises


def current_stream() -> Any:
    """CuPy's current stream as one of Numba's: work queued by either runs in the order of calls."""
    import cupy

    return _stream_at(cupy.cuda.get_current_stream().ptr)


@functools.lru_cache(maxsize=64)
def _stream_at(pointer: int) -> Any:
    """One object for each stream, whatever its device: it holds no more than the pointer."""
    return cuda.external_stream(pointer) if pointer else cuda.default_stream()


def on_device(*arrays: Any) -> tuple[Any, ...]:
    """CuPy arrays as Numba takes them, without waiting for the stream that fills them.

    They are C-contiguous afterwards, so that each kernel compiles for one layout.
    """
    import cupy

    return tuple(cuda.as_cuda_array(cupy.ascontiguousarray(a), sync=False) for a in arrays)


def bits_on_device(*arrays: Any) -> tuple[Any, ...]:
    """As `on_device`, as unsigned integers: for what is only moved, whatever floats it is."""
    import cupy

    contiguous = (cupy.ascontiguousarray(a) for a in arrays)
    return on_device(*(a.view(f"u{a.dtype.itemsize}") for a in contiguous))
