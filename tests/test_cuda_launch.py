"""What goes before every launch of a CUDA kernel: its configuration, and CuPy's stream.

Numba configures without a device; nothing is launched.
"""

import os
import sys
import threading
from types import SimpleNamespace

import pytest

from kfac_xp.kernels.cuda import launch, triangles

SMALL = (2, (32, 8), 0)  # few blocks


@pytest.fixture(autouse=True)
def not_simulated():
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("this process runs Numba's CUDA simulator")


def test_few_blocks_are_no_warning_and_those_of_others_are():
    """Warnings are errors here."""
    fill = launch.configured(triangles._pack, *SMALL)
    assert tuple(fill.griddim) == (2, 1, 1)
    assert tuple(fill.blockdim) == (32, 8, 1)
    with pytest.warns(match="Grid size 3"):
        triangles._pack[3, 32]


def test_what_is_configured_is_kept():
    assert launch.configured(triangles._pack, *SMALL) is launch.configured(triangles._pack, *SMALL)


def test_threads_put_the_setting_back():
    def configure(blocks):
        for threads in range(1, 65):
            launch.configured(triangles._pack, blocks, threads, 0)

    before = launch.cuda.config.CUDA_LOW_OCCUPANCY_WARNINGS
    workers = [threading.Thread(target=configure, args=(n,)) for n in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert launch.cuda.config.CUDA_LOW_OCCUPANCY_WARNINGS == before == 1


def test_a_stream_is_one_object(monkeypatch):
    """By which Numba finds what it has configured; another stream is another."""
    made = []

    def stream_at(pointer=0):
        made.append(pointer)
        return SimpleNamespace(pointer=pointer)

    current = SimpleNamespace(ptr=4096)
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: current))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(launch.cuda, "external_stream", stream_at)
    monkeypatch.setattr(launch.cuda, "default_stream", stream_at)
    launch._stream_at.cache_clear()
    try:
        first = launch.current_stream()
        assert launch.current_stream() is first
        for current.ptr in (8192, 0, 4096):
            assert launch.current_stream().pointer == current.ptr
        assert made == [4096, 8192, 0]
    finally:
        launch._stream_at.cache_clear()
