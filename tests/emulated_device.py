"""NumPy in CuPy's place, for kernels that run on an emulated device."""

import sys
from types import SimpleNamespace

import numpy as np

from benchmarks.emulator import Emulator
from kfac_xp.kernels.cuda import (
    averaged,
    correlation_blocks,
    patches,
    squared_channels,
    squared_outer,
    squared_tiles,
    triangles,
)

MODULES = (
    averaged,
    correlation_blocks,
    patches,
    squared_channels,
    squared_outer,
    squared_tiles,
    triangles,
)


class _Device:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


class Placed(np.ndarray):
    """An array with CuPy's `device`, which is a context, and its `data`, which have an address."""

    device = _Device()

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


def placed(x):
    """An array that looks as if it were on the device."""
    return np.asarray(x).view(Placed)


class Cupy:
    """What the kernels' callers use of CuPy."""

    cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0))

    def __init__(self, emulator):
        self.emulator, self.made = emulator, []

    def __getattr__(self, name):
        return getattr(np, name)

    def ascontiguousarray(self, a):
        return placed(np.ascontiguousarray(a))

    def empty(self, shape, dtype):
        self.made.append(self.emulator.empty(shape, dtype))
        return placed(self.made[-1])


def install(monkeypatch, *, one_block=False):
    """Let the kernels run on an emulator, which is returned with NumPy under CuPy's name.

    With `one_block` grids are as small as they can be.
    """
    emulator = Emulator()
    cupy = Cupy(emulator)

    def configured(kernel, grid, threads, stream):
        return lambda *arguments: emulator.launch(kernel, grid, threads, *arguments)

    def on_device(*arrays):
        return tuple(np.ascontiguousarray(a).view(np.ndarray) for a in arrays)

    def bits_on_device(*arrays):
        return tuple(a.view(f"u{a.dtype.itemsize}") for a in on_device(*arrays))

    monkeypatch.setitem(sys.modules, "cupy", cupy)
    stand_ins = {
        "configured": configured,
        "on_device": on_device,
        "bits_on_device": bits_on_device,
        "current_stream": lambda: None,
    }
    if one_block:
        stand_ins |= {"num_blocks": lambda size, threads: 1, "_BLOCKS": 1, "_MAX_BLOCKS": 1}
    for module in MODULES:
        for name, function in stand_ins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)
    return emulator, cupy
