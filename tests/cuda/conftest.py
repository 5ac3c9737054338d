"""Kernels in Numba's simulator, on NumPy's arrays in the place of CuPy's."""

import importlib
import os
import sys
import threading
import time

import numpy as np
import pytest

from tests.numpy_as_cupy import Cupy, placed


def pytest_collection_modifyitems(items):
    """Mark what is here; without the simulator it is skipped."""
    for item in items:
        if item.path.parent.name != "cuda":
            continue
        item.add_marker(pytest.mark.simulator)
        if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
            reason = "Numba's CUDA simulator is not on (NUMBA_ENABLE_CUDASIM=1)"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def lets_others_run(monkeypatch):
    """The simulator asks without end whether its threads live: here that gives them their turn.

    Otherwise it takes 5 ms of theirs (`sys.getswitchinterval`) each time that they stop. A shorter
    interval would help as well, but then two threads may each make an array that they share.
    """
    from numba.cuda.simulator.kernel import BlockThread

    def is_alive(thread):
        time.sleep(0)
        return threading.Thread.is_alive(thread)

    monkeypatch.setattr(BlockThread, "is_alive", is_alive)


@pytest.fixture
def kernels(monkeypatch):
    """Modules of kernels by name; a call is as with CuPy, of arrays made by `on_gpu`."""
    from kfac_xp.kernels.cuda import launch

    monkeypatch.setitem(sys.modules, "cupy", Cupy())
    as_cuda_array = {"as_cuda_array": lambda a, sync: np.asarray(a), "default_stream": lambda: 0}
    for name, function in as_cuda_array.items():
        monkeypatch.setattr(launch.cuda, name, function, raising=False)
    return lambda name: importlib.import_module(f"kfac_xp.kernels.cuda.{name}")


@pytest.fixture
def on_gpu():
    """Function to an array that has a device."""
    return placed
