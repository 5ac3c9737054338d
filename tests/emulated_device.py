"""Kernels on an emulated device, on NumPy's arrays in the place of CuPy's."""

import importlib
import sys

import numpy as np

from benchmarks.emulator import Emulator
from tests.numpy_as_cupy import Cupy, placed

MODULES = [
    importlib.import_module(f"kfac_xp.kernels.cuda.{name}")
    for name in (
        "averaged",
        "correlation_blocks",
        "patches",
        "squared_channels",
        "squared_outer",
        "squared_tiles",
        "triangles",
    )
]


class EmulatedCupy(Cupy):
    """Its new arrays are the emulator's, and are kept in `made`."""

    def __init__(self, emulator):
        self.emulator, self.made = emulator, []

    def empty(self, shape, dtype):
        self.made.append(self.emulator.empty(shape, dtype))
        return placed(self.made[-1])


def install(monkeypatch, *, one_block=False):
    """Let the kernels run on an emulator, which is returned with NumPy under CuPy's name.

    With `one_block` grids are as small as they can be.
    """
    emulator = Emulator()
    cupy = EmulatedCupy(emulator)

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
